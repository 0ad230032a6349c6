"""An engine: exact inference of a batch of sequences, split over ranks by context.

`cptool.engine.prefill.forwards` reads prompts; here are the steps of decode, of one token for every
sequence that is still generating, or of a few where tokens are drafted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cptool.distributed.world import World
from cptool.engine.drafts.begun import Begun
from cptool.engine.drafts.checked import Checked
from cptool.engine.prefill.forwards import Forwards
from cptool.engine.state import Mark
from cptool.engine.static_decode import Observer, StaticDecode, StepContext
from cptool.model.llama import Llama
from cptool.planning.cost.exchange import ALL_Q
from cptool.planning.strategy import AUTO, STATIC_ROWS, Choice
from cptool.sharding import dealt

STATIC_STEPS = 1024
"""Decode steps that room is made for at once."""


class Engine(Forwards):
    """A model on this rank's devices and a batch of sequences that it reads and continues.

    checked: tokens that were drafted and computed with the last one, and what follows each.

    Attributes, those of the base classes included, are for reading; the methods change them.
    """

    def __init__(self, model: Llama, world: World, **options: Any) -> None:
        """options: those of `Forwards`."""
        super().__init__(model, world, **options)
        self._stepping = False
        self.checked = Checked()
        self._begun: Begun | None = None

    @torch.inference_mode()
    def begin(
        self,
        tokens: Mapping[int, int],
        layers: int,
        *,
        variant: str | Choice,
        most: Mapping[int, int],
    ) -> dict[int, torch.Tensor]:
        """Compute one more token of the sequences in `tokens` in the first `layers` layers alone,
        after those that were begun since the last `advance`, which goes on from there and must be
        given all of them. Return the residual stream of those on this rank, [hidden] each.

        most: how many tokens of each sequence are begun at most; make room for them.
        """
        batch = range(len(self.tokens))
        if self._begun is None:
            self._drop_drafts()
            self._begun = Begun(layers)
            # Room is made now: growing the cache moves what counts as held alone.
            lengths = [most.get(b, 0) for b in batch]
            whole = dealt(lengths, self.computed, self.holdings.counts).placements()
            self.cache.extend(whole[self.world.cp_rank].to(self.world.device))
            self.cache.truncate(self.computed)
        todo = [[tokens[b]] if b in tokens else [] for b in batch]
        starts = [n + self._begun.counts.get(b, 0) for b, n in enumerate(self.computed)]
        self.choice = self._chosen(variant, list(map(len, todo)))
        layout = dealt(list(map(len, todo)), starts, self.holdings.counts)
        hidden, mine, _ = self._forward(todo, layout, layers=range(layers))
        return dict(zip(self._begun.add(tokens, hidden, mine), hidden, strict=True))

    @torch.inference_mode()
    def advance(
        self,
        picks: dict[int, int],
        left: int,
        *,
        variant: str | Choice | None = None,
        drafts: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        """Compute one more token of the sequences in `picks`, in at most `left` steps like this.

        `settle` must follow the last one before any other method is called.

        drafts: of some of these sequences, tokens that may come next. They are computed with it and
            do not count, but those that `accept` takes; steps over static memory take none.
        """
        if not picks:
            return
        self._drop_drafts()
        variant = self.variant if variant is None else variant
        if not self.goes_static(len(picks), variant):
            self._step(picks, drafts or {}, variant)
            return
        steps = self._steps if self._stepping else None
        if steps is None or not steps.remaining or 2 * len(picks) <= len(steps.sequences):
            steps = self._open_steps(sorted(picks), min(left, STATIC_STEPS))
        rows = steps.step(picks, {b: self.computed[b] for b in picks})
        for b, pick in picks.items():
            self.tokens[b].append(pick)
            self.computed[b] += 1
        self.logits = {b: row for b, row in self.logits.items() if b not in picks}
        if self.world.cp_rank == 0:  # authoritative if ranks differ in the last bit
            self.logits |= rows

    def _step(
        self, picks: dict[int, int], drafts: Mapping[int, Sequence[int]], variant: str | Choice
    ) -> None:
        batch = range(len(self.tokens))
        todo = [[picks[b], *drafts.get(b, ())] if b in picks else [] for b in batch]
        self.choice = self._chosen(variant, list(map(len, todo)))
        begun, self._begun = self._begun, None
        if begun is not None:
            self._go_back()
        layout = dealt(list(map(len, todo)), self.computed, self.holdings.counts)
        rest = range(0 if begun is None else begun.layers, len(self.model.layers))
        hidden, mine, _ = self._forward(todo, layout, layers=rest, begun=begun)
        with self.trace.span("logits", "linear"):
            rows = iter(self.model.logits(hidden) if len(hidden) else ())
        self.checked.begin(drafts)
        self.append([[picks[b]] if b in picks else [] for b in batch])
        for b, positions in enumerate(mine.sequences()):
            for position in positions.tolist():
                if position == self.computed[b]:
                    self.logits[b] = next(rows)
                else:
                    self.checked.logits[b, position] = next(rows)
        self.computed = [n + (b in picks) for b, n in enumerate(self.computed)]

    def accept(self, b: int, token: int) -> bool:
        """Append `token` to sequence b if it is what was drafted there, and return whether it is:
        its KV, and the logits of what follows it, are those that `advance` would compute.
        """
        if not self.checked.take(b, token):
            return False
        self.append([[token] if n == b else [] for n in range(len(self.tokens))])
        row = self.checked.logits.pop((b, self.computed[b]), None)
        self.computed[b] += 1
        if row is not None:
            self.logits[b] = row
        return True

    def _drop_drafts(self) -> None:
        """Forget the tokens that were drafted and not accepted, on this rank and of all others."""
        if self.checked.left:
            self._go_back()
        self.checked.begin({})

    def _go_back(self) -> None:
        """Hold the tokens that are computed and count, and no others."""
        self.cache.truncate(self.computed)
        self.holdings.truncate(self.computed)

    def truncate(self, lengths: list[int]) -> None:
        self._begun = None
        super().truncate(lengths)

    def rewind(self, mark: Mark) -> None:
        self._begun = None
        super().rewind(mark)

    def fixed(self, variant: str | None, rows: int) -> str | Choice:
        """Return a variant for all steps of an answer of `rows` sequences: what is chosen for one
        token of each now. A later choice, or one for more rows, might change the bits.
        """
        asked = self.variant if variant is None else variant
        if self.goes_static(rows, asked) or not rows:
            return asked
        return self._chosen(asked, [1] * rows)

    def goes_static(self, rows: int, variant: str | Choice) -> bool:
        """Return whether a step uses static memory: neither a variant nor a trace was requested."""
        return self.static and variant == AUTO and not self.trace.on and rows <= STATIC_ROWS

    def _open_steps(self, sequences: list[int], steps: int) -> StaticDecode:
        self.settle()
        if self._steps is None or not self._steps.reopen(sequences, steps):
            self._steps = None  # free its memory first
            context = StepContext(
                model=self.model,
                ring=self.ring,
                cache=self.cache,
                holdings=self.holdings,
                partial_dtype=self.partial_dtype,
                no_graph="messages go through host memory" if self.world.group.staged else None,
            )
            self._steps = StaticDecode(context, sequences, steps, self._observer)
        how = self._steps.reason
        reason = "in a CUDA graph" if how is None else f"kernel by kernel: {how}"
        reason = f"all new tokens on every rank, {reason}"
        self.choice = Choice(ALL_Q.name, self.world.cp, reason, 0.0)
        self._stepping = True
        return self._steps

    def settle(self) -> None:
        """Record the tokens of static steps in the cache, as `extend` does for its tokens, and drop
        drafts that were not accepted, those included that were only begun.
        """
        if self._begun is not None:
            self._begun = None
            self._go_back()
        self._drop_drafts()
        if not self._stepping:
            return
        self._stepping = False
        dealt = self.holdings.settle()
        self.cache.extend(dealt[self.world.cp_rank].to(self.world.device))

    def attach_observer(self, observer: Observer | None) -> None:
        """Call observer(layer, placement, q, out) after every attention; None detaches it.

        A CUDA graph cannot hold the call, so steps that are observed are not replayed from one.
        """
        self.settle()
        self._observer, self._steps = observer, None
