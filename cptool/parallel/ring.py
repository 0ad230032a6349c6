"""Moving blocks of tokens between the ranks of one context-parallel group.

Every size is known on both sides beforehand, so messages are exact and empty ones are not sent.
All transfers are symmetric batches of point-to-point operations: each rank posts its sends and its
receives together, which neither deadlocks nor depends on the order in which ranks arrive.

On CUDA the group is NCCL's, which works on a stream of its own. A transfer that is started waits
there for what the current stream has been given so far, and so reads what that has written and
writes to a buffer that nothing reads any more; kernels that follow on the current stream run beside
it, until `wait` makes the stream wait for the transfer's end. Tensors of a transfer are referred to
until then, and the memory of one that is dropped later goes to work of the current stream, which
comes after: the caching allocator needs no `record_stream`. The group's streams have high priority
(`cptool.distributed.connect`), or an attention kernel that fills the device would keep transfers
from starting before it ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from cptool.profiling.exposed_time import Exposure
from cptool.profiling.trace import SILENT, Recorder, Silent

# torch 2.13's name; before, it is the other one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ring:
    """Transfers within `group`; group None is a ring of one rank, which never communicates.

    sent_bytes: payload that this rank has sent.
    exposed_s: seconds that this rank, on CUDA its stream, has stood waiting for transfers, that is
        communication that compute did not hide; asking for it waits for the device.

    A transfer that fails (a peer died, or took longer than the group's timeout) raises the
    RuntimeError of the communication library.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self.sent_bytes = 0
        self.trace: Recorder | Silent = SILENT
        self._exposure, self._device = Exposure(), torch.device("cpu")
        self._memory: dict[int | str, torch.Tensor] = {}

    @property
    def exposed_s(self) -> float:
        return self._exposure.seconds

    def blocks(
        self, local: torch.Tensor, sizes: Sequence[int]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (source, block) of every rank: the own block, then rank + 1, rank + 2, ... mod N.

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
        """The blocks of all ranks in rank order; the own block is `local` itself.

        into: N contiguous tensors [sizes[r], ...] to receive in; the own entry is left alone.
        readers: whether rank r is given the blocks, the same on all ranks; one that is not gets
        empty ones. `local` is as in `blocks`.
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
        """All-to-all: give outgoing[r] to rank r, return what every rank gave to this one.

        outgoing: N contiguous tensors [n, ...]; sizes[s]: n of the tensor that rank s gives to this
        rank. The own entry is returned as it is.
        """
        like = outgoing[self.rank]
        return self._all_to_all(outgoing, [like.new_empty(size, *like.shape[1:]) for size in sizes])

    def all_gather(self, local: torch.Tensor) -> list[torch.Tensor]:
        """`local` [n, ...] of every rank, all of one size, in rank order: one collective."""
        whole = local.new_empty(self.size * local.shape[0], *local.shape[1:])
        began = self._exposure.begin(local.device)
        _all_gather(whole, local, group=self.group)
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
        """A [tokens, ...] tensor shaped like `like`, uninitialised, from memory kept under `name`.

        The memory grows as needed and is used again by the next call with this name: layers follow
        each other, and fresh pages for every layer would cost more than the copies into them.
        """
        needed = tokens * math.prod(like.shape[1:]) * like.element_size()
        memory = self._memory.get(name)
        if memory is None or memory.numel() < needed or memory.device != like.device:
            memory = torch.empty(needed, dtype=torch.uint8, device=like.device)
            self._memory[name] = memory
        return memory[:needed].view(like.dtype).view(tokens, *like.shape[1:])

    def send_receive(
        self, receiver: int, outgoing: torch.Tensor, sender: int, incoming: torch.Tensor
    ) -> list[dist.Work]:
        """Start sending `outgoing` to `receiver` and receiving `incoming` from `sender`.

        Both contiguous. Neither may be changed or freed before `wait` has returned.
        """
        return self._start([(receiver, outgoing)], [(sender, incoming)])

    def wait(self, pending: Sequence[dist.Work]) -> None:
        """Until the transfers are done; on CUDA, until later kernels of this stream see them so."""
        began = self._exposure.begin(self._device)
        with self.trace.span("wait", "exposed"):
            for work in pending:
                work.wait()
        self._exposure.end(began)

    def _start(
        self,
        sends: Sequence[tuple[int, torch.Tensor]],
        receives: Sequence[tuple[int, torch.Tensor]],
    ) -> list[dist.Work]:
        """Post one batch of (peer, tensor); both sides leave out empty tensors alike.

        Receives come first. gloo sends nothing until the receiver has said that its buffer is
        there, and says so on the connection that also carries data to that peer: behind a send
        that has begun, the word waits for all of it, and the two directions take turns.
        """
        operations = [
            dist.P2POp(operation, tensor, group=self.group, group_peer=peer)
            for operation, messages in ((dist.irecv, receives), (dist.isend, sends))
            for peer, tensor in messages
            if tensor.numel()
        ]
        for _, tensor in sends:
            self.sent_bytes, self._device = self.sent_bytes + tensor.nbytes, tensor.device
        works = dist.batch_isend_irecv(operations) if operations else []
        if self.trace.on and operations and operations[0].tensor.is_cpu:
            works = [
                self.trace.watch(
                    work, "receive" if o.op is dist.irecv else "send", o.group_peer, o.tensor.nbytes
                )
                for work, o in zip(works, operations, strict=True)
            ]
        return works
