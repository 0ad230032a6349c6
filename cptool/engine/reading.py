"""How far a forward over a prompt is, or over a chunk of it, and its end on request, within a layer
too.

Progress is the share of the work that is done, in time. A layer is its attention, counted in pairs
of a query and a key that it sees (the kernels count them, `cptool.ops.watch`), and the rest,
counted in rows. Which of the two takes which part of a layer, and the chunk which part of the
prompt, is that of `cptool.engine.prefill.course`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch

from cptool.distributed.status_board import Work
from cptool.engine.holdings import Holdings
from cptool.errors import Interrupted
from cptool.host import memory
from cptool.ops.watch import watched_attention
from cptool.planning.cost.counts import (
    attention_parameters,
    feed_forward_parameters,
    layers_by_window,
    new_pairs,
)
from cptool.sharding import Layout
from cptool.variants import find

if TYPE_CHECKING:
    from cptool.engine.prefill.course import Course
    from cptool.engine.prefill.forwards import Forwards
    from cptool.model.config import LlamaConfig
    from cptool.planning.cost.forward import Forward
    from cptool.planning.strategy import Choice

LONG, LONG_S = 512, 1.0
"""Forwards over more new tokens than this, or that are predicted to take longer than this, end
within a layer when that is requested. In shorter ones, to agree on it in every layer would count.
"""


class Report(Protocol):
    """Takes what a rank is doing, as `World.report` does."""

    def __call__(
        self, phase: str, done: int, total: int, *, work: Work | None = None
    ) -> object: ...


def silent(phase: str, done: int, total: int, *, work: Work | None = None) -> None:
    """Report nothing."""


class Layers:
    """Where the borders within a layer lie, as shares of its time.

    before: of the products ahead of attention. attention. The rest is what follows it.
    """

    def __init__(self, config: LlamaConfig, attention: float) -> None:
        first = attention_parameters(config)
        heads = config.num_attention_heads
        kept = 2 * heads + 2 * config.num_key_value_heads  # of q, k, v and o, in heads
        # Of the products' time, that of q, k and v, and that of the feed-forward network.
        self._qkv = first * (kept - heads) / kept / (first + feed_forward_parameters(config))
        self._rest = 1 - first / (first + feed_forward_parameters(config))
        self.attention = attention

    @property
    def before(self) -> float:
        return self._qkv * (1 - self.attention)

    def after_rows(self, done: int, rows: int) -> float:
        """Return the share of a layer that is done once `done` of `rows` have passed all of it."""
        return 1 - self._rest * (1 - self.attention) * (1 - done / rows)


class Reading:
    """The progress of one forward over a prompt, and its end on request.

    course: of the prompt, in which this forward has begun. choice: the forward's variant.
    layout: of the new tokens. pairs: what this rank's attention counts in a layer, by its window.
    """

    def __init__(
        self, engine: Forwards, course: Course, forward: Forward, *, choice: Choice, layout: Layout
    ) -> None:
        self.world, self.report, self.course = engine.world, engine.report, course
        self.layers, self.tokens = forward.config.num_hidden_layers, forward.new
        self.variant = choice.variant
        held = None if find(choice.variant).keys_travel else engine.holdings
        self.pairs = {
            window: engine.model.num_heads
            * attention_pairs(layout, engine.world.cp_rank, held, window)
            for window in layers_by_window(forward.config)
        }
        self._window = forward.config.window
        self.shares = Layers(forward.config, course.attention)
        long = self.tokens > LONG or self.layers * choice.predicted_s > LONG_S
        self.stoppable = long and self.world.board.shared
        self._layer = self._memory = 0
        self._attention_s = 0.0
        self._at = time.monotonic()
        self._events: list[torch.cuda.Event] = []

    @contextmanager
    def attention(self, layer: int) -> Iterator[None]:
        """Count what the body, the attention of a layer, computes.

        Raises Interrupted afterwards, on all ranks, if that was requested. Collective.
        """
        self._layer = layer
        self._limit_queue()
        self._memory = memory_held(self.world.device)
        now = time.monotonic()
        # Kernels on CUDA are only queued here: the clock says nothing of them.
        if layer and self.world.device.type == "cpu":
            self.course.took(self._attention_s, now - self._at)
            self.shares.attention = self.course.attention
        self._at = now
        if self.world.device.type == "cpu":
            board, rank = self.world.board, self.world.rank
            stop = board.cancelled_address() if self.stoppable else 0
            self._write(self.shares.before, running=self.shares.attention)
            with watched_attention(board.pairs_address(rank), stop):
                yield
        else:
            self._write(0.0)
            yield
        now = time.monotonic()
        self._attention_s = now - self._at
        self._at = now
        self.check()
        if self.world.device.type == "cpu":
            self._write(self.shares.before + self.shares.attention)

    def passed(self, done: int, rows: int) -> bool:
        """Record that `done` of `rows` have passed a layer; return whether to go on with it.

        Tensor-parallel ranks add up their results row by row, so none of them stops here.
        """
        if self.world.device.type == "cpu":
            self._write(self.shares.after_rows(done, rows))
        return self.world.tp > 1 or not self.stopped

    @property
    def stopped(self) -> bool:
        """Whether the launching process has requested a stop, which `check` will raise for."""
        return self.stoppable and self.world.board.cancelled

    def check(self) -> None:
        """Raise Interrupted on all ranks if the launching process has requested a stop.

        Collective.
        """
        if self.stoppable and self.world.agree_to_stop():
            raise Interrupted

    def end(self) -> None:
        """Record that the forward is over. Raises Interrupted as `check` does. Collective."""
        self.check()
        self._layer = self.layers
        self._write(0.0)

    def _write(self, within: float, running: float = 0.0) -> None:
        course = self.course
        work = Work(
            tokens=course.tokens,
            began=course.began,
            share=course.share((self._layer + within) / self.layers),
            running=course.part * running / self.layers,
            pairs=self.pairs[self._window(min(self._layer, self.layers - 1))],
            since=self.world.board.pairs(self.world.rank),
            done=course.done,
            chunk=course.chunk,
            chunks=course.chunks,
            variant=self.variant,
            memory=self._memory,
        )
        self.report("prefill, layer", min(self._layer, self.layers - 1), self.layers, work=work)

    def _limit_queue(self) -> None:
        """Have the host no more than a layer ahead of a CUDA device, so that progress is true."""
        if self.world.device.type != "cuda" or self.tokens <= LONG:
            return
        event = torch.cuda.Event()
        event.record()
        self._events.append(event)
        if len(self._events) > 1:
            self._events[-2].synchronize()
            self._layer -= 1


def memory_held(device: torch.device) -> int:
    """Return the bytes that this rank holds on its device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else memory.resident()


def attention_pairs(
    layout: Layout, rank: int, holdings: Holdings | None, window: int | None = None
) -> int:
    """Return the pairs of a new token and a key that it sees that the attention of `rank` has in a
    layer with that window.

    holdings: given where queries travel; then the keys are those that the rank holds, and the new
        tokens those of all ranks. Where keys travel it is the other way round.
    """
    if holdings is None or layout.ranks == 1:
        ranges = (piece for b in range(layout.batch) for piece in layout.ranges(rank, b))
        return sum(new_pairs(stop, window) - new_pairs(start, window) for start, stop in ranges)
    pairs = 0
    for bounds, keys in zip(layout.bounds, holdings.placements()[rank].sequences(), strict=True):
        start, stop = bounds[0], bounds[-1]
        if start < stop:
            keys = keys.to(torch.int64)
            lost = stop if window is None else (keys + window).clamp(max=stop)
            pairs += int((lost - keys.clamp(min=start)).clamp(min=0).sum())
    return pairs
