"""The world of a launcher, torchrun or srun, as the environment of this process describes it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from cptool.errors import UserError


@dataclass(frozen=True)
class Seat:
    """This process's rank in its world and on its machine, and the sizes of both."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def launched() -> Seat | None:
    """Return this process's seat in the world of torchrun or srun; None outside of one.

    Raises UserError if the environment is inconsistent.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size = _number("RANK"), _number("WORLD_SIZE")
        local_rank, local_size = _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", size)
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
            raise UserError(
                f"RANK {rank} of WORLD_SIZE {size}, LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE "
                f"{local_size}: ranks count from 0 to below their world's size; start them by "
                "torchrun or srun, or unset RANK"
            )
        return Seat(rank, size, local_rank, local_size)
    # Only srun's tasks have the variables of a step; a batch script, or a shell in an allocation,
    # has SLURM_NTASKS and SLURM_PROCID too, but is alone.
    size = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if "SLURM_PROCID" in env and size > 1:
        counts = _slurm_counts(env["SLURM_STEP_TASKS_PER_NODE"])
        local_size = counts[int(env["SLURM_NODEID"])]
        return Seat(int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), local_size)
    return None


def _number(name: str, default: int | None = None) -> int:
    value = os.environ.get(name, "" if default is None else str(default))
    try:
        return int(value)
    except ValueError:
        raise UserError(
            f"{name} is {value!r}, it must be a number; start the ranks by torchrun or srun, or "
            "unset RANK"
        ) from None


def launched_size() -> int | None:
    """Return the number of ranks of the launcher's world; None outside of one."""
    seat = launched()
    return seat.size if seat else None


def is_first_rank() -> bool:
    """Return whether this process is rank 0 of the launcher's world, or of no launcher."""
    seat = launched()
    return seat is None or seat.rank == 0


def _slurm_counts(listed: str) -> list[int]:
    """Return the number of tasks of each node from a list such as "4(x2),3"."""
    counts: list[int] = []
    for item in listed.split(","):
        count, _, repeat = item.rstrip(")").partition("(x")
        counts += [int(count)] * int(repeat or 1)
    return counts


def set_rendezvous_address() -> None:
    """Set MASTER_ADDR and MASTER_PORT if they are missing, as under srun; torchrun sets them.

    Raises UserError if the first node cannot be determined.
    """
    env = os.environ
    # Jobs that share a node, and steps of one job, must not meet each other.
    job, step = (int(env.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    env.setdefault("MASTER_PORT", str(10_000 + (100 * job + step) % 20_000))
    if "MASTER_ADDR" in env:
        return
    try:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]],
            capture_output=True,
            text=True,
            check=True,
        )
        env["MASTER_ADDR"] = shown.stdout.split()[0]
    except (OSError, KeyError, IndexError, subprocess.CalledProcessError):
        raise UserError(
            "MASTER_ADDR is not set and scontrol does not name the first node; "
            "set it to the host of rank 0"
        ) from None
