"""How much memory of this machine a process may still take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cptool.host import control_groups

_PROC = Path("/proc")
# Of control groups: version, then the files of the limit and of what is used, and in `memory.stat`
# the pages of files that can be dropped, which are used too.
_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available() -> int:
    """Bytes that can be taken without swapping: of the machine, and of the control groups (as
    containers have them) that this process is in. Raises OSError where the system does not tell.
    """
    told = _numbers(_PROC / "meminfo")
    return min([1024 * told["MemAvailable"], *_left_in_groups()])


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
    """Lines `name number` or `name: number unit`."""
    fields = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {name: int(number) for name, number, *_ in fields}
