"""A ring whose messages go from memory to memory between the ranks of one machine.

gloo moves a message by two copies through a socket and a thread of its own, which takes turns with
the compute on the core that both share. Here a sender records where its message lies, in memory
that all ranks of the machine map, and the receiver copies it from the sender's memory into place
when it needs it: one copy, no thread. Peers whose memory cannot be read (on another machine, in
another container) are reached by gloo, pair by pair.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import time
import uuid
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from cptool.distributed.group import Group
from cptool.distributed.shared_memory import is_here
from cptool.ops import extension
from cptool.parallel.ring import Message, Ring, Transfer
from cptool.profiling.trace import Recorder

_C = extension.load()

SUPPORTED = hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")
"""Whether the system has the calls for it, as Linux does."""

SLOTS = 64
"""Messages from one rank to another that may be under way at a time."""

_SPIN_US, _SLEEP_MS = 50, 100
_SLOT = struct.Struct("=QQ")  # where a message lies, its bytes; then two words of 32 bits
_POSTED, _TAKEN, _SLOT_BYTES = 16, 20, 24
_WORD = 1 << 32


class Gone(dist.DistNetworkError):
    """A peer ended, or did not arrive in time."""


class Process(NamedTuple):
    """A peer's process: its number, and a descriptor of it."""

    pid: int
    pidfd: int


class Offer(NamedTuple):
    """How a rank's shared memory is found, and a token at address `probe` that proves the access.

    fd: descriptor of the memory, called `name`, in the process `pid`.
    """

    pid: int
    fd: int
    name: str
    probe: int
    token: bytes


class Channel:
    """Messages from one rank to another, numbered from 1 on both sides.

    Message n lies in slot n mod SLOTS of `memory`, which both map: the sender writes address and
    size, then `posted` = n; the receiver copies, then `taken` = n.
    """

    def __init__(self, memory: mmap.mmap, index: int, peer: int, process: Process) -> None:
        self.memory, self.peer, self.pid = memory, peer, process.pid
        self.process = select.poll()
        self.process.register(process.pidfd, select.POLLIN)  # readable once the process has ended
        self.start = index * SLOTS * _SLOT_BYTES
        self.address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        self.begun = 0

    def next(self) -> tuple[int, int]:
        """Return the number of the next message, and where its slot begins."""
        self.begun += 1
        return self.begun, self.start + self.begun % SLOTS * _SLOT_BYTES

    def signal(self, word: int, number: int) -> None:
        """Set the word to `number` and wake the peer."""
        _C.signal_word(self.address + word, number % _WORD)

    def wait(self, word: int, number: int, patience: float) -> None:
        """Block until the word is `number`. Raise Gone if the peer ended or `patience` ran out."""
        address, value = self.address + word, number % _WORD
        deadline = time.monotonic() + patience
        while not _C.wait_word(address, value, _SPIN_US, _SLEEP_MS):
            if self.process.poll(0) and not _C.wait_word(address, value, 0, 0):
                raise Gone(f"rank {self.peer} of the ring (pid {self.pid}) has ended")
            if time.monotonic() > deadline:
                raise Gone(f"rank {self.peer} of the ring did not respond within {patience:g} s")


class Send:
    """A message under way; its tensor must not change until the peer has copied it."""

    def __init__(self, channel: Channel, tensor: torch.Tensor, patience: float) -> None:
        self.channel, self.tensor, self.patience = channel, tensor, patience
        self.number, self.slot = channel.next()
        if self.number > SLOTS:
            channel.wait(self.slot + _TAKEN, self.number - SLOTS, patience)
        _SLOT.pack_into(channel.memory, self.slot, tensor.data_ptr(), tensor.nbytes)
        channel.signal(self.slot + _POSTED, self.number)

    def wait(self) -> None:
        self.channel.wait(self.slot + _TAKEN, self.number, self.patience)


class Receive:
    """A message that the peer has posted or will post; the first wait copies it into `tensor`."""

    def __init__(self, channel: Channel, tensor: torch.Tensor, patience: float) -> None:
        self.channel, self.patience = channel, patience
        self.tensor: torch.Tensor | None = tensor
        self.number, self.slot = channel.next()

    def wait(self) -> None:
        if self.tensor is None:
            return
        channel, tensor = self.channel, self.tensor
        channel.wait(self.slot + _POSTED, self.number, self.patience)
        address, size = _SLOT.unpack_from(channel.memory, self.slot)
        if size != tensor.nbytes:
            raise RuntimeError(
                f"rank {channel.peer} of the ring sent {size} bytes, {tensor.nbytes} were due"
            )
        error = _C.read_peer(channel.pid, address, tensor.data_ptr(), size)
        if error:
            raise Gone(f"rank {channel.peer} of the ring: {os.strerror(error)}")
        channel.signal(self.slot + _TAKEN, self.number)
        self.tensor = None


class SharedRing(Ring):
    """`Ring` over a gloo group, for tensors of the CPU. Constructing it is collective.

    `local`: the ranks that are reached from memory to memory.
    """

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        assert group.process_group is not None
        options = group.process_group._get_backend(torch.device("cpu")).options
        self._patience = options._timeout.total_seconds()
        self._out: dict[int, Channel] = {}
        self._back: dict[int, Channel] = {}
        self._connect()
        self.local = sorted(self._out)

    def all_gather(self, local: torch.Tensor) -> list[torch.Tensor]:
        return self.gather(local, [local.shape[0]] * self.size)

    def _start(self, sends: Sequence[Message], receives: Sequence[Message]) -> list[Transfer]:
        far = super()._start(
            [message for message in sends if message[0] not in self._out],
            [message for message in receives if message[0] not in self._out],
        )
        # Sends are posted first: that takes no time, and a peer may be waiting. They are waited for
        # last: two ranks that wait for their sends first would wait for each other.
        near_sends = [m for m in sends if m[0] in self._out and m[1].numel()]
        near_receives = [m for m in receives if m[0] in self._out and m[1].numel()]
        posted: list[Transfer] = [Send(self._out[p], t, self._patience) for p, t in near_sends]
        self.sent_bytes += sum(tensor.nbytes for _, tensor in near_sends)
        expected: list[Transfer] = [
            Receive(self._back[p], t, self._patience) for p, t in near_receives
        ]
        trace = self.trace
        if isinstance(trace, Recorder):
            expected = [
                trace.watch(transfer, "receive", peer, tensor.nbytes)
                for transfer, (peer, tensor) in zip(expected, near_receives, strict=True)
            ]
            posted = [
                trace.watch(transfer, "send", peer, tensor.nbytes)
                for transfer, (peer, tensor) in zip(posted, near_sends, strict=True)
            ]
        return [*expected, *far, *posted]

    def _connect(self) -> None:
        """Open the channels to the ranks whose memory this one can read, and that can read its."""
        name, token = f"cptool-{uuid.uuid4().hex}", os.urandom(16)
        probe = torch.frombuffer(bytearray(token), dtype=torch.uint8)
        fd = os.memfd_create(name)
        try:
            size = self.size * SLOTS * _SLOT_BYTES
            os.ftruncate(fd, size)
            offers = self._gather_values((os.getpid(), fd, name, probe.data_ptr(), token))
            found: dict[int, tuple[mmap.mmap, Process]] = {}
            for rank, offer in enumerate(offers):
                if rank != self.rank and (opened := _open(Offer(*offer), size)) is not None:
                    found[rank] = opened
            readers = self._gather_values(sorted(found))
            own = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        for rank, (theirs, process) in found.items():
            weakref.finalize(self, os.close, process.pidfd)
            if self.rank in readers[rank]:
                self._out[rank] = Channel(own, rank, rank, process)
                self._back[rank] = Channel(theirs, self.rank, rank, process)

    def _gather_values(self, value: Any) -> list[Any]:
        return self.group.gather(value)


def _open(offer: Offer, size: int) -> tuple[mmap.mmap, Process] | None:
    """Return the memory that another rank offers, and its process; None where that is not on this
    machine or may not be read.
    """
    path, count = f"/proc/{offer.pid}/fd/{offer.fd}", len(offer.token)
    if not is_here(path, offer.name):
        return None
    seen = torch.zeros(count, dtype=torch.uint8)
    unread = _C.read_peer(offer.pid, offer.probe, seen.data_ptr(), count)
    if unread or bytes(seen.tolist()) != offer.token:
        return None
    try:
        opened = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(opened, size), Process(offer.pid, os.pidfd_open(offer.pid))
    except OSError:
        return None
    finally:
        os.close(opened)
