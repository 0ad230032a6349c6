"""How much memory of this machine a process may still take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cptool.host import control_groups

_PROC = Path("/proc")
# Version of the control group: the files of its limit and of its usage, and the field of
# `memory.stat` that counts cached file pages, which are part of the usage but can be dropped.
_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available() -> int:
    """Return the bytes that this process can allocate without swapping.

    That is the least of what the machine has and what the process's control groups (as containers
    have them) allow. Raises OSError if the system does not report it.
    """
    reported = _numbers(_PROC / "meminfo")
    return min([1024 * reported["MemAvailable"], *_left_in_groups()])


def resident() -> int:
    """Return the bytes of this process that are in memory, with pages that it shares; 0 if the
    system does not report it.
    """
    try:
        return int((_PROC / "self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _left_in_groups() -> Iterator[int]:
    for version, folder in control_groups.folders("memory"):
        limit, used, droppable = _FILES[version]
        try:
            most, now = ((folder / name).read_text().strip() for name in (limit, used))
            if most != "max":
                yield int(most) - int(now) + _numbers(folder / "memory.stat")[droppable]
        except (OSError, KeyError, ValueError):
            continue


def _numbers(path: Path) -> dict[str, int]:
    """Return the numbers of a file of lines `name number` or `name: number unit`, by name."""
    fields = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {name: int(number) for name, number, *_ in fields}
