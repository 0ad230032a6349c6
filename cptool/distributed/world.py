"""A rank's place in the world: its coordinates, device, groups and status board."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cptool.distributed.group import Group
from cptool.distributed.status_board import Board, Work

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class World:
    """This rank's place, by default that of a single rank: rank = cp_rank * tp + tp_rank.

    `local_rank` of `local_size` counts the ranks of this machine. group: all ranks. cp_group: those
    that share the context with this one. tp_group: those that share its weights.
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
    group: Group = field(default_factory=Group)
    cp_group: Group = field(default_factory=Group)
    tp_group: Group = field(default_factory=Group)

    def report(
        self, phase: str, done: int = 0, total: int = 0, *, work: Work | None = None
    ) -> None:
        """Record on the status board what this rank is doing; about a microsecond."""
        self.board.write(self.rank, phase, done, total, work=work)

    def agree_to_stop(self) -> bool:
        """Return whether the launching process has requested a stop, the same on every rank.

        Collective. Under a launcher no process can request it, and nothing is exchanged.
        """
        if not self.board.shared:
            return False
        stop = bool(self.group.sum_of([int(self.board.cancelled)])[0])
        if stop:
            self.board.notice()
        return stop

    def gather(self, value: Any, *types: type) -> list[Any]:
        """Return the `value` of every rank, in rank order. Tensors arrive on the CPU.

        value: any that `cptool.distributed.encoding` takes, with dataclasses of `types`.
        """
        return [value] if self.size == 1 else self.group.gather(value, *types)

    def group_for_a_thread(self, timeout: datetime.timedelta) -> Group:
        """Return another group of all ranks, whose messages are apart from those of the others, of
        values and tensors on the CPU. Collective.
        """
        if self.size == 1:
            return Group()
        import torch
        import torch.distributed as dist

        return Group(dist.new_group(timeout=timeout, backend="gloo"), torch.device("cpu"))

    def barrier(self) -> None:
        """Block until every rank is here."""
        self.gather(None)
