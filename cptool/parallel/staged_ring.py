"""A ring whose messages go through host memory: for ranks that share a GPU, and without NCCL.

NCCL takes one rank per GPU. Here messages leave the device for pinned memory, cross by gloo, and
return, on streams and in a thread of their own, so that they still run beside compute. Tensors of
the CPU take the same way without the streams, which is how the tests exercise it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from cptool.distributed.group import Group
from cptool.parallel.ring import Message, Ring, Transfer


@dataclass(kw_only=True)
class Batch:
    """The messages of one call: host memory for each, and where what arrives belongs.

    copied: event of the device after which host memory may be sent. arrived: event after which
    received messages are in place, set once `done`. error: why the batch failed.
    """

    sends: list[Message]
    receives: list[Message]
    targets: list[torch.Tensor]
    copied: torch.cuda.Event | None
    arrived: torch.cuda.Event | None = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """Block until received messages are in place for later kernels of the current stream."""
        self.done.wait()
        if self.error is not None:
            raise self.error
        if self.arrived is not None:
            torch.cuda.current_stream(self.targets[0].device).wait_event(self.arrived)


class StagedRing(Ring):
    """`Ring` over a gloo group, for tensors on any device."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self._jobs: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        self._out: torch.cuda.Stream | None = None
        self._in: torch.cuda.Stream | None = None
        self._thread: threading.Thread | None = None

    def all_gather(self, local: torch.Tensor) -> list[torch.Tensor]:
        return self.gather(local, [local.shape[0]] * self.size)

    def _start(self, sends: Sequence[Message], receives: Sequence[Message]) -> list[Transfer]:
        sends = [message for message in sends if message[1].numel()]
        receives = [message for message in receives if message[1].numel()]
        if not sends and not receives:
            return []
        self._device = device = (sends or receives)[0][1].device
        self._work_on(device)
        copied = None
        for stream in (self._out, self._in):
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream(device))
        with _on(self._out):
            outgoing = [(peer, _staging(t).copy_(t, non_blocking=True)) for peer, t in sends]
            if self._out is not None:
                copied = self._out.record_event()
        self.sent_bytes += sum(tensor.nbytes for _, tensor in sends)
        batch = Batch(
            sends=outgoing,
            receives=[(peer, _staging(tensor)) for peer, tensor in receives],
            targets=[tensor for _, tensor in receives],
            copied=copied,
        )
        self._jobs.put(batch)
        return [batch]

    def _work_on(self, device: torch.device) -> None:
        """Make the streams of the device, and the thread, if they do not exist yet."""
        if device.type == "cuda" and self._out is None:
            self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        if self._thread is None:
            self._thread = threading.Thread(target=self._carry, name="cptool-staged", daemon=True)
            self._thread.start()

    def _carry(self) -> None:
        """Carry out batches in the order in which they were started."""
        while True:
            batch = self._jobs.get()
            try:
                with torch.inference_mode():  # per thread, and targets may be made in it
                    self._exchange_on_host(batch)
            except BaseException as error:  # `wait` raises it
                batch.error = error
            batch.done.set()
            del batch  # its memory must not stay until the next one comes

    def _exchange_on_host(self, batch: Batch) -> None:
        if batch.copied is not None:
            batch.copied.synchronize()
        sides = ((dist.irecv, batch.receives), (dist.isend, batch.sends))
        operations = [
            dist.P2POp(operation, tensor, group=self.group.process_group, group_peer=peer)
            for operation, messages in sides
            for peer, tensor in messages
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        with _on(self._in):
            for target, (_, tensor) in zip(batch.targets, batch.receives, strict=True):
                target.copy_(tensor, non_blocking=True)
            if self._in is not None and batch.targets:
                batch.arrived = self._in.record_event()


def _staging(tensor: torch.Tensor) -> torch.Tensor:
    """Return host memory of the tensor's shape, pinned for a tensor of a device; torch reuses such
    memory once the copies from and to it are done.
    """
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _on(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
