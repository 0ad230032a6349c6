"""What a rank does when: spans of its own thread and of its transfers, for `--profile`.

Spans nest, and a moment belongs to the innermost one, so the times of the phases add up to the
wall. A transfer is seen from its start to its completion by a thread that waits for it, because the
communication library tells of a completion only to who waits. Without a recorder there is SILENT,
whose spans cost 0.1 us.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

    from cptool.model.llama import Llama

PHASES = ("linear", "attention", "exposed", "sampling", "small ops")
"""What a span is: products with weights; attention over keys and merging; waiting for a transfer;
picking a token; the rest of the model (norms, rotations, activations, storing KV)."""


@dataclass(frozen=True)
class Span:
    """Seconds of `time.perf_counter`. own_s: without the spans inside."""

    name: str
    phase: str
    begin: float
    end: float
    own_s: float


@dataclass(frozen=True)
class Transfer:
    """One message, from its start to its completion."""

    name: str
    peer: int
    bytes: int
    begin: float
    end: float


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
        self.transfers: list[Transfer] = []
        self.kernels: list[Kernel] | None = None  # of the device, where it is not the CPU
        self._open: list[list] = []  # name, phase, begin, seconds inside of spans within
        self._waiters = ThreadPoolExecutor(64, thread_name_prefix="cptool-trace")
        self._lock = threading.Lock()

    @contextmanager
    def span(self, name: str, phase: str) -> Iterator[None]:
        """What happens in the `with` block is `phase`, except in spans inside of it."""
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
        self.spans.append(Span(name, phase, begin, end, end - begin - inside))

    def watch(self, work: dist.Work, name: str, peer: int, count: int) -> Watched:
        """Notes when the transfer of `count` bytes is done; wait for what this returns instead."""
        begin = time.perf_counter()

        def wait() -> None:
            work.wait()
            with self._lock:
                end = time.perf_counter()
                self.transfers.append(Transfer(name, peer, count, begin, end))

        return Watched(self._waiters.submit(wait))

    def between(self, begin: float, end: float) -> tuple[list[Span], list[Transfer]]:
        """What lies in [begin, end)."""
        spans = [span for span in self.spans if begin <= span.begin < end]
        return spans, [t for t in self.transfers if begin <= t.begin < end]

    def attach(self, model: Llama) -> None:
        """Makes every linear layer of `model` a span, and the sum over ranks that may follow it."""
        from torch import nn

        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            reduced = bool(module._forward_hooks)  # by `cptool.parallel.tensor_parallel`
            label = name.rpartition(".")[2]

            def begin(module, inputs, label=label) -> None:
                self.start(label, "linear")

            def end(module, inputs, output, reduced=reduced) -> None:
                self.stop()
                if reduced:
                    self.start("all-reduce", "exposed")

            module.register_forward_pre_hook(begin)
            module.register_forward_hook(end, prepend=True)
            if reduced:
                module.register_forward_hook(lambda *_: self.stop())


class Watched:
    """Stands for a transfer that another thread waits for."""

    def __init__(self, future) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()


@dataclass(frozen=True)
class Kernel:
    """What ran on a stream of the device, a copy too; seconds of `time.perf_counter`."""

    name: str
    stream: int
    begin: float
    end: float
