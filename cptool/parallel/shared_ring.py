"""A ring whose messages go from memory to memory between the ranks of one machine.

gloo moves a message by two copies through a socket and a thread of its own, which takes turns with
the compute on the core that both share. Here a sender notes where its message lies, in memory that
all ranks of the machine map, and the receiver copies it from the sender's memory into place when it
comes to need it: one copy, no thread. Peers that cannot be read like that (on another machine, in
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
from typing import Any

import torch
import torch.distributed as dist

from cptool.distributed.gathering import gather_values
from cptool.distributed.shared_memory import is_here
from cptool.ops import extension
from cptool.parallel.ring import Ring

_C = extension.load()

Message = tuple[int, torch.Tensor]

SUPPORTED = hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")
"""Whether the system has what it takes: Linux does."""

SLOTS = 64
"""Messages from one rank to another that may be under way at a time."""

_SPIN_US, _SLEEP_MS = 50, 100
_SLOT = struct.Struct("=QQ")  # where a message lies, its bytes; then two words of 32 bits
_POSTED, _TAKEN, _SLOT_BYTES = 16, 20, 24
_WORD = 1 << 32


class Gone(dist.DistNetworkError):
    """A peer ended, or did not come in time."""


class Channel:
    """Messages from one rank to another, numbered from 1; both sides count alike.

    Message n lies in slot n mod SLOTS of `memory`, which both map: the sender writes address and
    size, then `posted` = n; the receiver copies, then `taken` = n.
    """

    def __init__(self, memory: mmap.mmap, index: int, peer: int, pid: int, pidfd: int):
        self.memory, self.peer, self.pid = memory, peer, pid
        self.process = select.poll()
        self.process.register(pidfd, select.POLLIN)  # readable from the process's end on
        self.start = index * SLOTS * _SLOT_BYTES
        self.address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        self.begun = 0

    def next(self) -> tuple[int, int]:
        """The number of the next message, and where its slot begins."""
        self.begun += 1
        return self.begun, self.start + self.begun % SLOTS * _SLOT_BYTES

    def signal(self, word: int, number: int) -> None:
        _C.signal_word(self.address + word, number % _WORD)

    def wait(self, word: int, number: int, patience: float) -> None:
        """Until the word says `number`; raises Gone."""
        address, value = self.address + word, number % _WORD
        deadline = time.monotonic() + patience
        while not _C.wait_word(address, value, _SPIN_US, _SLEEP_MS):
            if self.process.poll(0) and not _C.wait_word(address, value, 0, 0):
                raise Gone(f"rank {self.peer} of the ring (pid {self.pid}) has ended")
            if time.monotonic() > deadline:
                raise Gone(f"rank {self.peer} of the ring did not come within {patience:g} s")


class Post:
    """A message on its way; its tensor must stay as it is until it was taken."""

    def __init__(self, channel: Channel, tensor: torch.Tensor, patience: float):
        self.channel, self.tensor, self.patience = channel, tensor, patience
        self.number, self.slot = channel.next()
        if self.number > SLOTS:
            channel.wait(self.slot + _TAKEN, self.number - SLOTS, patience)
        _SLOT.pack_into(channel.memory, self.slot, tensor.data_ptr(), tensor.nbytes)
        channel.signal(self.slot + _POSTED, self.number)

    def wait(self) -> None:
        self.channel.wait(self.slot + _TAKEN, self.number, self.patience)


class Receipt:
    """A message that the peer has posted or will; the first wait copies it into `tensor`."""

    def __init__(self, channel: Channel, tensor: torch.Tensor, patience: float):
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
    """`Ring` over a gloo group, for tensors of the CPU. All ranks of the group construct it
    together.

    `local`: the ranks that are reached from memory to memory.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        options = group._get_backend(torch.device("cpu")).options
        self._patience = options._timeout.total_seconds()
        self._out: dict[int, Channel] = {}
        self._back: dict[int, Channel] = {}
        self._connect()
        self.local = sorted(self._out)

    def all_gather(self, local: torch.Tensor) -> list[torch.Tensor]:
        return self.gather(local, [local.shape[0]] * self.size)

    def _start(self, sends: Sequence[Message], receives: Sequence[Message]) -> list[Any]:
        far = super()._start(
            [message for message in sends if message[0] not in self._out],
            [message for message in receives if message[0] not in self._out],
        )
        # Posts first: they take no time, and a peer may be waiting. But waits go in the order of
        # the list, and a rank that waited for its sends first would wait for one that does too.
        posts = [
            Post(self._out[peer], tensor, self._patience)
            for peer, tensor in sends
            if peer in self._out and tensor.numel()
        ]
        self.sent_bytes += sum(post.tensor.nbytes for post in posts)
        receipts = [
            Receipt(self._back[peer], tensor, self._patience)
            for peer, tensor in receives
            if peer in self._out and tensor.numel()
        ]
        if self.trace.on:
            receipts = [self._watch("receive", receipt) for receipt in receipts]
            posts = [self._watch("send", post) for post in posts]
        return [*receipts, *far, *posts]

    def _watch(self, name: str, work: Post | Receipt) -> Any:
        return self.trace.watch(work, name, work.channel.peer, work.tensor.nbytes)

    def _connect(self) -> None:
        """Opens the channels to those ranks that can be read, and can read this one."""
        name, token = f"cptool-{uuid.uuid4().hex}", os.urandom(16)
        probe = torch.frombuffer(bytearray(token), dtype=torch.uint8)
        fd = os.memfd_create(name)
        try:
            size = self.size * SLOTS * _SLOT_BYTES
            os.ftruncate(fd, size)
            offers = self._gather_values((os.getpid(), fd, name, probe.data_ptr(), token))
            found: dict[int, tuple[mmap.mmap, int, int]] = {}
            for rank, offer in enumerate(offers):
                if rank != self.rank and (opened := _open(*offer, size)) is not None:
                    found[rank] = (*opened, offer[0])
            readers = self._gather_values(sorted(found))
            own = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        for rank, (theirs, pidfd, pid) in found.items():
            weakref.finalize(self, os.close, pidfd)
            if self.rank in readers[rank]:
                self._out[rank] = Channel(own, rank, rank, pid, pidfd)
                self._back[rank] = Channel(theirs, self.rank, rank, pid, pidfd)

    def _gather_values(self, value: Any) -> list[Any]:
        return gather_values(value, group=self.group)


def _open(
    pid: int, fd: int, name: str, probe: int, token: bytes, size: int
) -> tuple[mmap.mmap, int] | None:
    """The memory that another rank offers and a descriptor of its process; None where that is not
    on this machine or may not be read.
    """
    path = f"/proc/{pid}/fd/{fd}"
    if not is_here(path, name):
        return None
    seen = torch.zeros(len(token), dtype=torch.uint8)
    if _C.read_peer(pid, probe, seen.data_ptr(), len(token)) or bytes(seen.tolist()) != token:
        return None
    try:
        opened = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(opened, size), os.pidfd_open(pid)
    except OSError:
        return None
    finally:
        os.close(opened)
