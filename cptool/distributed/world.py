"""A rank's place in the world: its coordinates, device, groups and status board."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cptool.distributed.status_board import Board

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class World:
    """This rank's place, by default that of a single rank: rank = cp_rank * tp + tp_rank.

    Groups are None where they hold this rank alone. `local_rank` of `local_size` counts the ranks
    of this machine. `staged`: messages between devices go through host memory
    (`cptool.parallel.staged_ring`), and groups carry tensors of the CPU alone. `direct`: by the
    group's library and nothing else, as CPTOOL_TRANSPORT requested.
    """

    device: torch.device
    board: Board
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    cp_rank: int = 0
    cp: int = 1
    tp_rank: int = 0
    tp: int = 1
    cp_group: dist.ProcessGroup | None = None
    tp_group: dist.ProcessGroup | None = None
    staged: bool = False
    direct: bool = False

    @property
    def wire(self) -> torch.device:
        """Where tensors lie that the groups' collectives take."""
        import torch

        return torch.device("cpu") if self.staged else self.device

    def report(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Record on the status board what this rank is doing; about a microsecond."""
        self.board.write(self.rank, phase, done, total)

    def gather(self, value: Any, *types: type) -> list[Any]:
        """Return the `value` of every rank, in rank order. Tensors arrive on the CPU.

        value: any that `cptool.distributed.encoding` takes, with dataclasses of `types`.
        """
        if self.size == 1:
            return [value]
        from cptool.distributed.gathering import gather_values

        return gather_values(value, types)

    def barrier(self) -> None:
        """Block until every rank is here."""
        self.gather(None)
