"""Where drafts come from, and how often they come true."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from cptool.engine.drafts.pace import Acceptance, Budget, Worth

Draft = tuple[int, int]
"""A token, and the kind that `Acceptance` counts it as."""


class Source(ABC):
    """Drafts tokens for a batch of sequences, the same on every rank.

    priors: those of `Acceptance`.
    tried: how many drafts were computed on this rank, those included that were then not worth
        checking.
    true: how many of those that `expect` was given came true.
    """

    def __init__(self, priors: Sequence[float]) -> None:
        self.acceptance = Acceptance(priors)
        self.tried = self.true = 0
        self._open: dict[int, Iterator[Draft]] = {}

    def prepare(self) -> None:
        """Do what takes time before the first step, once. Collective."""
        return

    @abstractmethod
    def find(
        self, picks: Mapping[int, int], most: Mapping[int, int], budget: Budget
    ) -> dict[int, list[int]]:
        """Return up to `most[b]` tokens that may follow picks[b], the next token of each sequence,
        as far as they pay. Collective.
        """

    def expect(self, drafts: Mapping[int, Iterable[Draft]]) -> None:
        """Compare the tokens to come with these drafts, each sequence up to the first that is not
        drafted.
        """
        self._open = {b: iter(row) for b, row in drafts.items()}

    def came(self, b: int, token: int) -> None:
        """Take note of the next token of sequence b."""
        expected = next(self._open.get(b, iter(())), None)
        if expected is not None:
            true = token == expected[0]
            self.acceptance.record(expected[1], true=true)
            self.true += true
            if not true:
                del self._open[b]


class Successive(Source):
    """A source that computes each draft from the one before."""

    def __init__(self, priors: Sequence[float]) -> None:
        super().__init__(priors)
        self._worth = Worth(sum(priors) / len(priors))
        self._counted = 0, 0

    def _pays(self, budget: Budget) -> bool:
        """Return whether to compute drafts for a step, after what became of those before."""
        tried, true = self._counted
        if self.tried > tried:
            self._worth.record(self.tried - tried, self.true - true)
        self._counted = self.tried, self.true
        pays = self._worth.pays(budget)
        if not pays:
            self.acceptance.relax()
        return pays

    @abstractmethod
    def _compute(self, tokens: Mapping[int, int], wanted: Collection[int]) -> Mapping[int, Draft]:
        """Take the next token of each sequence in `tokens`, and return a draft to follow it for
        each that is `wanted`; called for the last drafts too.
        """

    def _computed(
        self, picks: Mapping[int, int], most: Mapping[int, int], budget: Budget
    ) -> dict[int, list[Draft]]:
        """Return up to `most[b]` drafts of each sequence, as far as they pay."""
        drafts: dict[int, list[Draft]] = {b: [] for b in picks}
        chances = dict.fromkeys(picks, 1.0)
        tokens = dict(picks)
        while tokens:
            found = self._compute(tokens, [b for b in tokens if len(drafts[b]) < most[b]])
            self.tried += len(found)
            tokens = {}
            likely = {
                b: chances[b] * self.acceptance.chance(kind) for b, (_, kind) in found.items()
            }
            for b in sorted(likely, key=lambda b: (-likely[b], b)):
                if budget.take(likely[b]):
                    chances[b] = likely[b]
                    drafts[b].append(found[b])
                    tokens[b] = found[b][0]
        return drafts
