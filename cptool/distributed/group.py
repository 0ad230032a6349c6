"""The ranks of one process group, whatever carries their messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


class Group:
    """Sums and gathers among the ranks of a process group; by default, this rank alone.

    rank, size: of this rank within the group, and of the group.
    device: where the ranks' tensors lie; None for a group of one rank, which sends nothing.
    staged: the process group carries CPU tensors alone, so tensors of a device go through
        host memory, here and in `cptool.parallel.staged_ring`.
    direct: the process group's library carries all messages, as CPTOOL_TRANSPORT requested.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        *,
        staged: bool = False,
        direct: bool = False,
    ) -> None:
        self.process_group, self.device = process_group, device
        self.rank = 0 if process_group is None else process_group.rank()
        self.size = 1 if process_group is None else process_group.size()
        self.staged, self.direct = staged, direct

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its sum over the ranks. Collective."""
        if self.process_group is None:
            return
        import torch.distributed as dist

        carried = tensor.cpu() if self.staged else tensor
        dist.all_reduce(carried, group=self.process_group)
        if carried is not tensor:  # they are the same for a tensor on the CPU
            tensor.copy_(carried)

    def sum_of(self, values: Sequence[int]) -> list[int]:
        """Return the sums of `values` over the ranks, element by element. Collective."""
        if self.process_group is None:
            return list(values)
        import torch

        carried = torch.tensor(values, device="cpu" if self.staged else self.device)
        torch.distributed.all_reduce(carried, group=self.process_group)
        return carried.tolist()

    def gather(self, value: Any, *types: type) -> list[Any]:
        """Return the `value` of every rank, in rank order. Collective; see `gather_values`."""
        if self.process_group is None:
            return [value]
        from cptool.distributed.gathering import gather_values

        return gather_values(value, types, self.process_group)
