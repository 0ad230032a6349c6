"""Spans of a rank's own thread and of its transfers, for `--profile`.

Spans nest, and a moment belongs to the innermost one, so the times of the phases add up to the wall
time. A thread waits for each transfer, because the communication library reports a completion only
to the caller that waits. Without a recorder there is SILENT, whose spans cost 0.1 us.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cptool.model.llama import Llama
    from cptool.parallel.ring import Transfer

PHASES = ("linear", "attention", "exposed", "sampling", "small ops")
"""What a span is: products with weights; attention over keys and merging; waiting for a transfer;
picking a token; the rest of the model (norms, rotations, activations, storing KV)."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Work of a phase, in seconds of `time.perf_counter`.

    own_s: without the spans inside. layer: the decoder layer that it is part of, from 0; None
    outside the layers.
    """

    name: str
    phase: str
    begin: float
    end: float
    own_s: float
    layer: int | None = None


@dataclass(frozen=True, kw_only=True)
class TransferSpan:
    """One message, from its start to its completion, in seconds of `time.perf_counter`; `layer` as
    in a Span.
    """

    name: str
    peer: int
    bytes: int
    begin: float
    end: float
    layer: int | None = None


class Silent:
    """Records nothing."""

    on = False
    _nothing = nullcontext()

    def span(self, name: str, phase: str) -> AbstractContextManager[None]:
        return self._nothing


SILENT = Silent()


class Recorder:
    """Spans of the thread that made it, and transfers."""

    on = True

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.transfers: list[TransferSpan] = []
        self.kernels: list[Kernel] | None = None  # of the device, where it is not the CPU
        self._open: list[list] = []  # name, phase, begin, seconds inside of spans within
        self._layer: int | None = None
        self._layers: list[Span] = []
        self._waiters = ThreadPoolExecutor(64, thread_name_prefix="cptool-trace")
        self._lock = threading.Lock()

    @contextmanager
    def span(self, name: str, phase: str) -> Iterator[None]:
        """Record the `with` block as `phase`, except spans inside it."""
        self.start(name, phase)
        try:
            yield
        finally:
            self.stop()

    def start(self, name: str, phase: str) -> None:
        self._open.append([name, phase, time.perf_counter(), 0.0])

    def stop(self) -> None:
        end = time.perf_counter()
        name, phase, begin, inside = self._open.pop()
        if self._open:
            self._open[-1][3] += end - begin
        self.spans.append(
            Span(
                name=name,
                phase=phase,
                begin=begin,
                end=end,
                own_s=end - begin - inside,
                layer=self._layer,
            )
        )

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """Record the `with` block as a layer of the model, to which the spans inside belong."""
        self._layer = number
        try:
            with self.span(f"layer {number}", "small ops"):
                yield
        finally:
            self._layer = None
        self._layers.append(self.spans[-1])

    def keep(self, kernels: Sequence[Kernel]) -> None:
        """Record what ran on the device; a kernel belongs to the layer that launched it."""
        begins = [span.begin for span in self._layers]

        def layer_of(kernel: Kernel) -> int | None:
            if kernel.launched is None:
                return None
            at = bisect_right(begins, kernel.launched) - 1
            inside = at >= 0 and kernel.launched < self._layers[at].end
            return self._layers[at].layer if inside else None

        self.kernels = [replace(kernel, layer=layer_of(kernel)) for kernel in kernels]

    def watch(self, work: Transfer, name: str, peer: int, count: int) -> Watched:
        """Record when a transfer of `count` bytes completes. Return what to wait for instead."""
        begin, layer = time.perf_counter(), self._layer

        def wait() -> None:
            work.wait()
            with self._lock:
                end = time.perf_counter()
                self.transfers.append(
                    TransferSpan(
                        name=name, peer=peer, bytes=count, begin=begin, end=end, layer=layer
                    )
                )

        return Watched(self._waiters.submit(wait))

    def between(self, begin: float, end: float) -> tuple[list[Span], list[TransferSpan]]:
        """Return the spans and transfers that begin in [begin, end)."""
        spans = [span for span in self.spans if begin <= span.begin < end]
        return spans, [t for t in self.transfers if begin <= t.begin < end]

    def attach(self, model: Llama) -> None:
        """Make every layer and every product of `model` a span, and the sum over ranks that may
        follow a product.
        """
        from cptool.model.product import Product

        model.span = self.layer
        for name, module in model.named_modules():
            if isinstance(module, Product):
                module.span = partial(self.span, name.rpartition(".")[2], "linear")
                if module.reduce is not None:
                    module.reduce = self._timed(module.reduce)

    def _timed(self, reduce: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
        def timed(partial_sum: torch.Tensor) -> None:
            with self.span("all-reduce", "exposed"):
                reduce(partial_sum)

        return timed


class Watched:
    """A transfer for whose completion another thread waits."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What ran on a stream of the device, a copy too; seconds of `time.perf_counter`.

    launched: when the host launched it, None if unknown. layer: as in a Span.
    """

    name: str
    stream: int
    begin: float
    end: float
    launched: float | None = None
    layer: int | None = None
