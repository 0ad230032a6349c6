"""Moving blocks of tokens between the ranks of one context-parallel group.

Every size is known on both sides beforehand, so messages are exact and empty ones are not sent.
All transfers are symmetric batches of point-to-point operations: each rank posts its sends and its
receives together, which neither deadlocks nor depends on the order in which ranks arrive.

On CUDA the group is NCCL's, which works on a stream of its own. A transfer that is started waits
there for what is queued on the current stream so far, so it reads what that has written and writes
to a buffer that nothing reads any more; kernels that follow on the current stream run beside it,
until `wait` makes the stream wait for the end of the transfer. The tensors of a transfer are
referenced until then, and memory that is freed later is reused by the current stream, whose work
comes after: the caching allocator needs no `record_stream`. The streams of our own groups have high
priority and few thread blocks (`cptool.distributed.devices`), and attention leaves room for these
(`Ring.margin`), otherwise a kernel that fills the device would keep transfers from starting before
it ends. It leaves none where the number of thread blocks is not known, as in most groups of a
user's program.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from cptool.distributed.devices import nccl_blocks
from cptool.distributed.group import Group
from cptool.host import large_pages
from cptool.profiling.exposed_time import Exposure
from cptool.profiling.trace import SILENT, Recorder, Silent

# The name since torch 2.13, and the one before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Message = tuple[int, torch.Tensor]
"""A peer, and the tensor that it is sent or that it fills."""


class Transfer(Protocol):
    """Messages under way: one, or a batch that completes as a whole."""

    def wait(self) -> object:
        """Block until the messages have arrived; on CUDA, until later kernels see them so."""


class Ring:
    """Transfers within `group`; a group of one rank never communicates.

    sent_bytes: payload that this rank has sent.
    exposed_s: seconds that this rank, on CUDA its stream, has stood waiting for transfers:
        communication that compute did not hide. Reading it synchronizes with the device.

    A transfer that fails (a peer died, or took longer than the group's timeout) raises the
    RuntimeError of the communication library.
    """

    def __init__(self, group: Group | None = None) -> None:
        self.group = group or Group()
        self.rank, self.size = self.group.rank, self.group.size
        self.sent_bytes = 0
        self.trace: Recorder | Silent = SILENT
        self._exposure, self._device = Exposure(), torch.device("cpu")
        self._memory: dict[int | str, torch.Tensor] = {}
        self._batches = 0  # under way
        self._blocks, carrier, device = 0, self.group.process_group, self.group.device
        if carrier and device and device.type == "cuda" and not self.group.staged:
            self._blocks = nccl_blocks(carrier)

    @property
    def margin(self) -> int:
        """Multiprocessors of the device that the transfers under way take, as far as is known."""
        return self._blocks if self._batches > 0 and self._device.type == "cuda" else 0

    @property
    def exposed_s(self) -> float:
        """Seconds stood waiting so far; synchronizes with the device."""
        return self._exposure.seconds

    def blocks(
        self, local: torch.Tensor, sizes: Sequence[int]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (source, block) of every rank: this rank's own, then rank + 1, rank + 2, ... mod N.

        local: [sizes[rank], ...], contiguous; every rank gives the same dtype and trailing shape.
        sizes: tokens of each rank's block.

        Blocks move to the predecessor, so sources ascend up to N - 1 and then from 0. The next
        block travels while the caller computes on the yielded one, which stays valid until the
        next iteration: there are two receive buffers, kept from call to call, and a block is
        received into the one whose block the caller has finished with.
        """
        successor, predecessor = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        block, source = local, self.rank
        for step in range(self.size - 1):
            following = (source + 1) % self.size
            arriving = self.buffer(step % 2, max(sizes), local)[: sizes[following]]
            pending = self._start([(predecessor, block)], [(successor, arriving)])
            with self.trace.span(f"block of rank {source}", "attention"):
                yield source, block
            self.wait(pending)
            block, source = arriving, following
        with self.trace.span(f"block of rank {source}", "attention"):
            yield source, block

    def gather(
        self,
        local: torch.Tensor,
        sizes: Sequence[int],
        into: Sequence[torch.Tensor] | None = None,
        readers: Sequence[bool] | None = None,
    ) -> list[torch.Tensor]:
        """Return the blocks of all ranks in rank order; this rank's own is `local` itself.

        local, sizes: as in `blocks`.
        into: N contiguous tensors [sizes[r], ...] to receive in; this rank's own is left alone.
        readers: whether rank r receives the blocks, the same on all ranks; a rank that does not
            gets empty ones.
        """
        readers = readers or [True] * self.size
        outgoing = [local if reads else local[:0] for reads in readers]
        if not readers[self.rank]:
            sizes, into = [0] * self.size, None
        if into is None:
            into = [local.new_empty(size, *local.shape[1:]) for size in sizes]
        return self._all_to_all(outgoing, into)

    def exchange(
        self, outgoing: Sequence[torch.Tensor], sizes: Sequence[int]
    ) -> list[torch.Tensor]:
        """Send outgoing[r] to rank r and return what every rank sent to this one (all-to-all).

        outgoing: N contiguous tensors [n, ...]. sizes[s]: n of the tensor that rank s sends to this
        rank. This rank's own entry is returned as it is.
        """
        like = outgoing[self.rank]
        return self._all_to_all(outgoing, [like.new_empty(size, *like.shape[1:]) for size in sizes])

    def all_gather(self, local: torch.Tensor) -> list[torch.Tensor]:
        """Return `local` [n, ...] of every rank, all of one size, in rank order: one collective."""
        whole = local.new_empty(self.size * local.shape[0], *local.shape[1:])
        began = self._exposure.begin(local.device)
        _all_gather(whole, local, group=self.group.process_group)
        self._exposure.end(began)
        self.sent_bytes += (self.size - 1) * local.nbytes
        return list(whole.split(local.shape[0]))

    def _all_to_all(
        self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Send outgoing[r] to every other rank r and receive incoming[r] from it."""
        # The nearest neighbour first, so that ranks do not all send to the same one.
        ahead = [(self.rank + step) % self.size for step in range(1, self.size)]
        self.wait(
            self._start(
                [(peer, outgoing[peer]) for peer in ahead],
                [(peer, incoming[peer]) for peer in reversed(ahead)],
            )
        )
        received = list(incoming)
        received[self.rank] = outgoing[self.rank]
        return received

    def buffer(self, name: int | str, tokens: int, like: torch.Tensor) -> torch.Tensor:
        """Return an uninitialised [tokens, ...] tensor like `like`, in memory kept under `name`.

        The memory grows as needed and is reused by the next call with this name: layers follow each
        other, and fresh pages for every layer would cost more than the copies into them. Names that
        are numbers, those of `blocks`, and other names are of different variants: what is kept
        under the ones is freed when the others are requested.
        """
        needed = tokens * math.prod(like.shape[1:]) * like.element_size()
        if any(type(kept) is not type(name) for kept in self._memory):
            self._memory.clear()
        memory = self._memory.get(name)
        if memory is None or memory.numel() < needed or memory.device != like.device:
            memory = large_pages.empty((needed,), torch.uint8, like.device)
            self._memory[name] = memory
        return memory[:needed].view(like.dtype).view(tokens, *like.shape[1:])

    def send_receive(
        self, receiver: int, outgoing: torch.Tensor, sender: int, incoming: torch.Tensor
    ) -> list[Transfer]:
        """Start sending `outgoing` to `receiver` and receiving `incoming` from `sender`.

        Both contiguous. Neither may be changed or freed before `wait` has returned.
        """
        return self._start([(receiver, outgoing)], [(sender, incoming)])

    def wait(self, pending: Sequence[Transfer]) -> None:
        """Block until the transfers complete; on CUDA, make this stream's later kernels wait."""
        began = self._exposure.begin(self._device)
        with self.trace.span("wait", "exposed"):
            for transfer in pending:
                transfer.wait()
        self._exposure.end(began)
        self._batches -= 1

    def _start(self, sends: Sequence[Message], receives: Sequence[Message]) -> list[Transfer]:
        """Post one batch; sender and receiver both leave out empty tensors.

        Receives come first. gloo sends nothing until the receiver has announced its buffer, on the
        connection that also carries data to that peer: behind a send that has begun, the
        announcement waits for all of it, and the two directions take turns.
        """
        operations = [
            dist.P2POp(operation, tensor, group=self.group.process_group, group_peer=peer)
            for operation, messages in ((dist.irecv, receives), (dist.isend, sends))
            for peer, tensor in messages
            if tensor.numel()
        ]
        for _, tensor in sends:
            self.sent_bytes, self._device = self.sent_bytes + tensor.nbytes, tensor.device
        works: list[dist.Work] = dist.batch_isend_irecv(operations) if operations else []
        self._batches += 1
        trace = self.trace
        if isinstance(trace, Recorder) and operations and operations[0].tensor.is_cpu:
            return [
                trace.watch(
                    work, "receive" if o.op is dist.irecv else "send", o.group_peer, o.tensor.nbytes
                )
                for work, o in zip(works, operations, strict=True)
            ]
        return [*works]
