"""How much memory of this machine a process takes, and may still take."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cptool.host import control_groups

_PROC = Path("/proc")
# Version of the control group: the files of its limit and of its usage, and the field of
# `memory.stat` that counts cached file pages, which are part of the usage but can be dropped.
_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


class Mapping(Protocol):
    """A file that this process alone has in memory. resident: the most bytes of it that are."""

    @property
    def resident(self) -> int: ...


own_mappings: weakref.WeakSet[Mapping] = weakref.WeakSet()
"""Those that are in use. Other files are taken to be shared by the ranks of a machine."""


def available() -> int:
    """Return the bytes that this process can allocate without swapping.

    That is the least of what the machine has and what the process's control groups (as containers
    have them) allow. Raises OSError if the system does not report it.
    """
    reported = _numbers(_PROC / "meminfo")
    return min([1024 * reported["MemAvailable"], *(left for _, left in _groups())])


def total() -> int:
    """Return the bytes of memory that this machine has, or that the process's control groups allow.
    Raises OSError if the system does not report it.
    """
    whole = 1024 * _numbers(_PROC / "meminfo")["MemTotal"]
    return min([whole, *(most for most, _ in _groups())])


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Resident bytes of this process: its own pages, those of files and of memory that processes
    share, and the most that both together ever were.
    """

    private: int
    shared: int
    peak: int

    def held(self, sharing: int) -> float:
        """Return its own bytes and its part of what `sharing` processes share."""
        return self.private + self.shared / sharing

    def most(self, sharing: int) -> float:
        """Return the peak of the same, as long as what is shared has only grown."""
        return max(self.private, self.peak - self.shared) + self.shared / sharing


def usage() -> Usage:
    """Return what this process takes; all 0 if the system does not report it."""
    fields = {"RssAnon": 0, "RssFile": 0, "RssShmem": 0, "VmHWM": 0}
    with suppress(OSError, ValueError):
        for line in (_PROC / "self/status").read_text().splitlines():
            name, _, count = line.partition(":")
            if name in fields:
                fields[name] = 1024 * int(count.split()[0])
    own = min(sum(each.resident for each in list(own_mappings)), fields["RssFile"])
    shared = fields["RssFile"] + fields["RssShmem"] - own
    return Usage(private=fields["RssAnon"] + own, shared=shared, peak=fields["VmHWM"])


def resident() -> int:
    """Return the bytes of this process that are in memory, with pages that it shares; 0 if the
    system does not report it.
    """
    now = usage()
    return now.private + now.shared


def forget_peak() -> None:
    """Have the peak of `usage` count from now on, where the system allows that."""
    with suppress(OSError):
        (_PROC / "self/clear_refs").write_text("5")


def _groups() -> Iterator[tuple[int, int]]:
    """Yield what each control group of the process allows, and what is left of that."""
    for version, folder in control_groups.folders("memory"):
        limit, used, droppable = _FILES[version]
        try:
            most, now = ((folder / name).read_text().strip() for name in (limit, used))
            if most != "max":
                dropped = _numbers(folder / "memory.stat")[droppable]
                yield int(most), int(most) - int(now) + dropped
        except (OSError, KeyError, ValueError):
            continue


def _numbers(path: Path) -> dict[str, int]:
    """Return the numbers of a file of lines `name number` or `name: number unit`, by name."""
    fields = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {name: int(number) for name, number, *_ in fields}
