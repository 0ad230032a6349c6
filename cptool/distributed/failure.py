"""How a rank's failure is described, and whether it only follows from another rank's failure."""

from __future__ import annotations

from cptool.distributed.status_board import Board
from cptool.errors import (
    RunError,
    explain,
    text_of,
)


class RankFailed(RunError):
    """A rank died or raised: one line names it and what it was doing. All ranks were ended."""


def is_communication(error: BaseException) -> bool:
    """Whether the error is that of a transfer, most often a consequence of another rank's end."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
    )


def describe(rank: int, board: Board, error: BaseException) -> str:
    """Return one line: the rank, what it was doing, the error without the library's source path."""
    broke_off = is_communication(error)
    reason = f"{type(error).__name__}: {text_of(error)}" if broke_off else explain(error)
    return f"rank {rank} failed during {board.read(rank)}: {reason}"
