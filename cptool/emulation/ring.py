"""A ring with one real rank: the variants' own code runs on it, and messages are recorded instead
of sent.

The compute between transfers is timed; `replay` then inserts the time of the transfers over a link
and returns the part of it that compute does not hide.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cptool.distributed.devices import NCCL_BLOCKS
from cptool.parallel.ring import Ring, Transfer
from cptool.planning.hardware import Link

PAUSE = "pause"
"""Label of time that a run on real ranks does not spend."""


@dataclass(frozen=True)
class Compute:
    """`seconds` of work under `label`."""

    label: str
    seconds: float


@dataclass(frozen=True)
class Start:
    """The start of transfer `transfer`: a batch of `messages`, `bytes` in the busier direction."""

    transfer: int
    bytes: int
    messages: int


@dataclass(frozen=True)
class Wait:
    """The rank blocks until these transfers complete."""

    transfers: tuple[int, ...]


Trace = list[Compute | Start | Wait]


class Timeline:
    """Marks on a device's stream of work; on CUDA they are events, so that marking never blocks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._entries: list[tuple[str, object] | Start | Wait] = []

    def mark(self, label: str) -> None:
        """Begin time under `label`, up to the next mark."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._entries.append((label, event))
        else:
            self._entries.append((label, time.perf_counter()))

    def note(self, entry: Start | Wait) -> None:
        """Record the start of a transfer, or a wait."""
        self._entries.append(entry)

    def trace(self) -> Trace:
        """Return what happened between the first mark and the last, without pauses."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        trace: Trace = []
        label, began = None, None
        for entry in self._entries:
            if isinstance(entry, (Start, Wait)):
                trace.append(entry)
                continue
            if label is not None and label != PAUSE:
                trace.append(Compute(label, self._between(began, entry[1])))
            label, began = entry
        return trace

    def _between(self, began: Any, ended: Any) -> float:
        return 1e-3 * began.elapsed_time(ended) if self.device.type == "cuda" else ended - began


@dataclass(frozen=True)
class _Noted:
    """A batch of messages that is recorded instead of sent."""

    number: int

    def wait(self) -> None:
        """Do nothing: received tensors are filled already."""


class EmulatedRing(Ring):
    """The transfers of rank `rank` of `size`, whose peers keep pace with it.

    Received tensors are filled with random values; the time to write them is a pause of the
    timeline.
    """

    def __init__(self, rank: int, size: int, timeline: Timeline) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self.timeline, self._transfers = timeline, 0
        self._blocks = NCCL_BLOCKS  # as those of the ring that this stands for

    def _start(
        self,
        sends: Sequence[tuple[int, torch.Tensor]],
        receives: Sequence[tuple[int, torch.Tensor]],
    ) -> list[Transfer]:
        self.timeline.mark(PAUSE)
        for _, tensor in receives:
            tensor.normal_()
        sent, received = (sum(t.nbytes for _, t in side) for side in (sends, receives))
        self.sent_bytes += sent
        self._transfers += 1
        self._batches, self._device = self._batches + 1, receives[0][1].device
        messages = sum(bool(tensor.numel()) for _, tensor in sends)
        self.timeline.note(Start(self._transfers, max(sent, received), messages))
        self.timeline.mark("attention")
        return [_Noted(self._transfers)]

    def wait(self, pending: Sequence[Transfer]) -> None:
        """Record that the rank waits for `pending`."""
        self.timeline.mark("attention")  # ends what ran before, which belongs before the wait
        self._batches -= 1
        numbers = (transfer.number for transfer in pending if isinstance(transfer, _Noted))
        self.timeline.note(Wait(tuple(numbers)))


def replay(trace: Sequence[Compute | Start | Wait], link: Link, steals: float = 0.0) -> float:
    """Return the seconds that the transfers of `trace`, over `link`, add to its compute.

    A transfer's latency is never hidden. Its bytes follow those before it on the link, both ways at
    once; a wait costs the time left of them, or `steals` times their whole time if that is more:
    the part that compute loses meanwhile, as in `cptool.planning.cost`.
    """
    clock = busy = exposed = 0.0
    flowing: dict[int, tuple[float, float]] = {}
    for entry in trace:
        if isinstance(entry, Compute):
            clock += entry.seconds
        elif isinstance(entry, Start):
            late = lasting = 0.0
            if entry.bytes:
                late = link.latency_s + max(0, entry.messages - 1) * link.message_overhead_s
                lasting = entry.bytes / (link.fan_out if entry.messages > 1 else link.bandwidth)
            exposed, clock = exposed + late, clock + late
            busy = max(clock, busy) + lasting
            flowing[entry.transfer] = (busy, lasting)
        else:
            for transfer in entry.transfers:
                done, lasting = flowing[transfer]
                spent = max(done - clock, steals * lasting)
                exposed, clock = exposed + spent, clock + spent
    return exposed
