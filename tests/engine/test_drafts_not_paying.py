"""Drafts that are computed one after another stop where they do not pay, and are tried again."""

import pytest

from cptool.engine.drafts.chooser import PRIORS
from cptool.engine.drafts.pace import Budget, StepTime
from cptool.engine.drafts.source import Successive


class Computing(Successive):
    """Drafts token 1 everywhere, as a draft of one kind."""

    def __init__(self, kind):
        super().__init__(PRIORS)
        self._kind = kind

    def find(self, picks, most, budget):
        if not self._pays(budget):
            return {}
        drafts = self._computed(picks, most, budget)
        self.expect(drafts)
        return {b: [token for token, _ in row] for b, row in drafts.items()}

    def _compute(self, tokens, wanted):
        return dict.fromkeys(wanted, (1, self._kind))


def asked(source, steps, *, batch=1, token=2):
    """The steps in which `source` computes anything while every token that comes is `token`."""
    found = []
    for step in range(steps):
        before = source.tried
        most = dict.fromkeys(range(batch), 7)
        drafts = source.find(dict.fromkeys(most, 0), most, Budget(batch, StepTime(), room=15))
        if source.tried > before:
            found.append(step)
        for b in most:
            for draft in (*drafts.get(b, ()), None):
                source.came(b, token)
                if draft != token:
                    break
    return found


@pytest.mark.parametrize("kind", range(len(PRIORS)))
@pytest.mark.parametrize("batch", [1, 2])
def test_what_never_comes_true_is_seldom_computed(kind, batch):
    source = Computing(kind)
    assert 3 <= len(asked(source, 64, batch=batch)) <= 9
    assert 2 <= len(asked(source, 640, batch=batch)) <= 16


def test_what_comes_true_is_computed_in_every_step():
    source = Computing(len(PRIORS) - 1)
    assert len(asked(source, 64, token=1)) == 64


def test_drafts_come_back_where_the_text_changes():
    source = Computing(len(PRIORS) - 1)
    asked(source, 200)
    assert len(asked(source, 200, token=1)) >= 130
