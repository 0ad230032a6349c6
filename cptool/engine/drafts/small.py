"""Drafts by a small model with the same vocabulary.

The small model is whole on rank 0, and the other ranks receive its drafts: one message of a few
integers per step. Split over the ranks, each of its layers would wait for messages that take as
long as the layer does; a copy on every rank would hold its weights and KV as often, compete for the
memory bandwidth of a machine, and could draft otherwise where ranks differ in the last bit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from cptool.checkpoint import open_checkpoint
from cptool.distributed.world import World
from cptool.engine.drafts.chooser import PRIORS, Chooser
from cptool.engine.drafts.pace import Budget
from cptool.engine.drafts.source import Draft, Successive
from cptool.engine.engine import Engine
from cptool.engine.prefill.prompt import read
from cptool.engine.samples import Samples, sampled
from cptool.engine.setup.drafting import PIECE
from cptool.engine.weights import load_model
from cptool.errors import Interrupted

if TYPE_CHECKING:
    from cptool.engine.answers.records import AnswerOptions
    from cptool.model.llama import Llama
    from cptool.planning.strategy import Choice


class SmallModel:
    """A model that drafts, on rank 0 of `world`, and the sequences that it has read, which stay
    from answer to answer.

    path, dtype: the checkpoint, and the dtype to compute in.
    """

    def __init__(self, world: World, path: str, dtype: torch.dtype) -> None:
        self.world, self.context = world, 0
        self._model: Llama | None = None
        self._engine: Engine | None = None
        if world.rank == 0:
            checkpoint = open_checkpoint(path)
            self.context = checkpoint.config.max_position_embeddings
            self._model = load_model(checkpoint, dtype, world.device)
            checkpoint.release()

    def reading(self, tokens: Sequence[Sequence[int]]) -> Engine | None:
        """Return an engine that has read as many `tokens` of each sequence as its context holds;
        None on ranks without one, and where a stop was requested meanwhile. Collective.
        """
        group = self.world.group
        if self._model is None:
            while group.sum_of([0])[0]:
                continue
            return None
        try:  # a message after each piece, for the others wait only so long
            return self._read(self._model, [list(said[: self.context]) for said in tokens])
        except Interrupted:
            return None
        finally:
            group.sum_of([0])

    def _read(self, model: Llama, tokens: list[list[int]]) -> Engine:
        if self._engine is None or len(self._engine.tokens) != len(tokens):
            self._engine = None  # free its KV first
            alone = World(device=self.world.device, board=self.world.board)
            self._engine = Engine(model, alone, batch=len(tokens))
        engine = self._engine
        pairs = zip(engine.tokens, tokens, strict=True)
        same = [common(held, said) for held, said in pairs]
        engine.truncate(same)
        new = [said[n:] for said, n in zip(tokens, same, strict=True)]
        if any(new):
            read(engine, new, chunk=PIECE, between=self._go_on)
        return engine

    def _go_on(self) -> None:
        """Have the ranks that wait for this one wait on."""
        self.world.group.sum_of([1])


def common(held: Sequence[int], said: Sequence[int], start: int = 0) -> int:
    """Return how many first tokens two sequences have in common, of which `start` are known."""
    most = min(len(held), len(said))
    while start < most and held[start] == said[start]:
        start += 1
    return start


class ModelDrafts(Successive):
    """Drafts by `small` for the sequences in `active`."""

    def __init__(
        self, engine: Engine, options: AnswerOptions, active: Collection[int], small: SmallModel
    ) -> None:
        super().__init__(PRIORS)
        self._engine, self._active, self._small = engine, active, small
        self._chooser = Chooser(engine, options)
        self._same: dict[int, int] = {}
        self._drafting: Engine | None = None
        self._variant: str | Choice | None = None
        self._ready = False

    def prepare(self) -> None:
        if self._ready:
            return
        self._ready = True
        engine = self._engine
        engine.report("drafts: read the text", 0, 0)
        prompts = engine.prompts if isinstance(engine, Samples) else engine
        asked = {b // engine.samples for b in self._active}
        tokens = [said if b in asked else [] for b, said in enumerate(prompts.tokens)]
        found = self._small.reading(tokens)
        if found is not None:
            self._drafting = sampled(found, engine.samples, room=0)
            self._variant = self._drafting.fixed(None, len(self._active))

    def find(
        self, picks: Mapping[int, int], most: Mapping[int, int], budget: Budget
    ) -> dict[int, list[int]]:
        drafts = self._found(picks, most, budget)
        order = sorted(picks)
        numbers = []
        for b in order:
            row = drafts.get(b, [])
            flat = [number for draft in row for number in draft]
            numbers += [len(row), *flat, *[0] * (2 * (most[b] - len(row)))]
        numbers = self._small.world.group.sum_of(numbers)
        drafts = {}
        for b in order:
            count, end = numbers[0], 1 + 2 * most[b]
            flat, numbers = numbers[1 : 1 + 2 * count], numbers[end:]
            drafts[b] = list(zip(flat[::2], flat[1::2], strict=True))
        self.expect(drafts)
        return {b: [token for token, _ in row] for b, row in drafts.items()}

    def _found(
        self, picks: Mapping[int, int], most: Mapping[int, int], budget: Budget
    ) -> dict[int, list[Draft]]:
        """Return drafts on the rank that has the model, none on the others."""
        if self._drafting is None:
            return {}
        room = {b: self._small.context - len(self._engine.tokens[b]) - 1 for b in picks}
        fitting = {b: max(0, min(most[b], room[b])) for b in picks}
        if not any(fitting.values()) or not self._pays(budget):
            return {}
        for b in picks:  # what came since may not be what was drafted
            self._same[b] = min(self._same.get(b, 0), self._chooser.known[b])
        self._chooser.begin(picks)
        return self._computed(picks, fitting, budget)

    def _compute(self, tokens: Mapping[int, int], wanted: Collection[int]) -> dict[int, Draft]:
        self._chooser.append(tokens)
        if not wanted:
            return {}
        drafting, texts = self._drafting, self._chooser.texts
        assert drafting is not None  # or nothing is computed
        lengths = list(map(len, drafting.tokens))
        for b in wanted:
            same = common(drafting.tokens[b], texts[b], self._same[b])
            lengths[b] = self._same[b] = min(same, len(texts[b]) - 1)
        drafting.truncate(lengths)
        new = [texts[b][n:] if b in wanted else [] for b, n in enumerate(lengths)]
        drafting.extend(new, variant=self._variant)
        return self._chooser.choose({b: drafting.logits[b] for b in wanted})
