"""A ring whose messages go through host memory: for ranks that share a GPU, and without NCCL.

NCCL takes one rank a GPU. Here messages leave the device for pinned memory, cross by gloo, and
return, on streams of their own and a thread of its own, so that they still run beside compute.
Tensors of the CPU take the same way without the streams, which is how the tests go through it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from cptool.parallel.ring import Ring

if TYPE_CHECKING:
    pass

Message = tuple[int, torch.Tensor]


@dataclass
class Transfer:
    """One batch: host memory for each message, where what arrives belongs, and how it went.

    copied: what must have happened on the device before host memory may be sent. arrived: after
    which what arrived lies in its place, once `done`.
    """

    sends: list[Message]
    receives: list[Message]
    targets: list[torch.Tensor]
    copied: torch.cuda.Event | None
    arrived: torch.cuda.Event | None = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """Until what arrived is in its place for later kernels of the current stream."""
        self.done.wait()
        if self.error is not None:
            raise self.error
        if self.arrived is not None:
            torch.cuda.current_stream(self.targets[0].device).wait_event(self.arrived)


class StagedRing(Ring):
    """`Ring` over a gloo group, for tensors on any device."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._jobs: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self._out = self._in = None
        self._thread: threading.Thread | None = None

    def all_gather(self, local: torch.Tensor) -> list[torch.Tensor]:
        return self.gather(local, [local.shape[0]] * self.size)

    def _start(self, sends: Sequence[Message], receives: Sequence[Message]) -> list[Transfer]:
        sends, receives = ([m for m in side if m[1].numel()] for side in (sends, receives))
        if not sends and not receives:
            return []
        self._device = device = (sends or receives)[0][1].device
        self._work_on(device)
        copied = None
        for stream in filter(None, (self._out, self._in)):
            stream.wait_stream(torch.cuda.current_stream(device))
        with _on(self._out):
            outgoing = [(peer, _staging(t).copy_(t, non_blocking=True)) for peer, t in sends]
            if self._out is not None:
                copied = self._out.record_event()
        self.sent_bytes += sum(tensor.nbytes for _, tensor in sends)
        transfer = Transfer(
            sends=outgoing,
            receives=[(peer, _staging(tensor)) for peer, tensor in receives],
            targets=[tensor for _, tensor in receives],
            copied=copied,
        )
        self._jobs.put(transfer)
        return [transfer]

    def _work_on(self, device: torch.device) -> None:
        """Sees that there are streams for the device, and the thread."""
        if device.type == "cuda" and self._out is None:
            self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        if self._thread is None:
            self._thread = threading.Thread(target=self._carry, name="cptool-staged", daemon=True)
            self._thread.start()

    def _carry(self) -> None:
        """Carries out transfers in the order in which they were started."""
        while True:
            transfer = self._jobs.get()
            try:
                with torch.inference_mode():  # a thread has its own, and targets may be made in it
                    self._exchange_on_host(transfer)
            except BaseException as error:  # the rank that waits for it raises it
                transfer.error = error
            transfer.done.set()
            del transfer  # its memory must not stay until the next one comes

    def _exchange_on_host(self, transfer: Transfer) -> None:
        if transfer.copied is not None:
            transfer.copied.synchronize()
        batch = ((dist.irecv, transfer.receives), (dist.isend, transfer.sends))
        operations = [
            dist.P2POp(operation, tensor, group=self.group, group_peer=peer)
            for operation, messages in batch
            for peer, tensor in messages
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        with _on(self._in):
            for target, (_, tensor) in zip(transfer.targets, transfer.receives, strict=True):
                target.copy_(tensor, non_blocking=True)
            if self._in is not None and transfer.targets:
                transfer.arrived = self._in.record_event()


def _staging(tensor: torch.Tensor) -> torch.Tensor:
    """Host memory of the tensor's shape, pinned for a tensor of a device; torch keeps such memory
    for its next use, once copies from and to it are done.
    """
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _on(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
