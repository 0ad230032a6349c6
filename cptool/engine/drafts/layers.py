"""Drafts by the first layers of the model itself (Elhoushi et al., LayerSkip, 2024).

After the first E layers, the final norm and the output matrix give a draft; the next one follows
from it in the same way. What the drafts have computed of these layers, KV included, is what the
check needs of them: it goes on at layer E with all of them together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch

from cptool.engine.drafts.chooser import PRIORS, Chooser
from cptool.engine.drafts.pace import Budget
from cptool.engine.drafts.source import Draft, Successive

if TYPE_CHECKING:
    from cptool.engine.answers.records import AnswerOptions
    from cptool.engine.engine import Engine
    from cptool.planning.strategy import Choice


class LayerDrafts(Successive):
    """Drafts by the first `layers` layers of the model of `engine`, which are computed under the
    variant of its steps.
    """

    def __init__(
        self, engine: Engine, options: AnswerOptions, layers: int, variant: str | Choice
    ) -> None:
        super().__init__(PRIORS)
        self._engine, self._layers, self._variant = engine, layers, variant
        self._chooser = Chooser(engine, options)
        self._most: Mapping[int, int] = {}

    def find(
        self, picks: Mapping[int, int], most: Mapping[int, int], budget: Budget
    ) -> dict[int, list[int]]:
        if not any(most.values()) or not self._pays(budget):
            return {}
        self._most = {b: 1 + count for b, count in most.items()}
        self._chooser.begin(picks)
        drafts = self._computed(picks, most, budget)
        self.expect(drafts)
        return {b: [token for token, _ in row] for b, row in drafts.items()}

    @torch.inference_mode()
    def _compute(self, tokens: Mapping[int, int], wanted: Collection[int]) -> dict[int, Draft]:
        engine, world = self._engine, self._engine.world
        rows = engine.begin(tokens, self._layers, variant=self._variant, most=self._most)
        self._chooser.append(tokens)
        mine = [b for b in rows if b in wanted]
        found: dict[int, Draft] = {}
        if mine:
            with engine.trace.span("logits", "linear"):
                logits = engine.model.logits(torch.stack([rows[b] for b in mine]))
            found = self._chooser.choose(dict(zip(mine, logits, strict=True)))
        if world.cp == 1 or not wanted:
            return found
        numbers = [n for b in wanted for n in found.get(b, (0, 0))]
        with engine.trace.span("all-reduce", "exposed"):
            numbers = world.cp_group.sum_of(numbers)
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        return dict(zip(wanted, pairs, strict=True))
