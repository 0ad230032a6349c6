"""The control groups of this process, by which containers and batch systems limit resources."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_SELF = Path("/proc/self")


def folders(controller: str) -> Iterator[tuple[int, Path]]:
    """Yield (version, folder) of the control group that limits this process, and of its parents.

    controller: "cpu" or "memory". The folders run from the group up to the mount point; there are
    none if the system has no control groups.

    A folder need not exist: inside a container, the listed path may be the one that the group has
    outside, and the container's own root then stands for the end of that path.
    """
    try:
        mounts = (_SELF / "mountinfo").read_text().splitlines()
        groups = (_SELF / "cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    roots = list(_mounted(mounts, controller))
    for _, controllers, group in (line.split(":", 2) for line in groups if line.count(":") > 1):
        version = 1 if controller in controllers.split(",") else 2 if not controllers else None
        for mounted, shown, root in roots:
            if version != mounted:
                continue
            # A mount may show only a part of the hierarchy, and paths start at the whole's root.
            below = group[len(shown) :] if (group + "/").startswith(shown + "/") else group
            inside = root.joinpath(*(part for part in below.split("/") if part not in ("", "..")))
            for folder in (inside, *inside.parents):
                yield version, folder
                if folder == root:
                    break


def _mounted(lines: list[str], controller: str) -> Iterator[tuple[int, str, Path]]:
    """Yield the version, the group that the mount shows ("" for the root) and the mount point."""
    for line in lines:
        before, dash, after = line.partition(" - ")
        kind, options = after.split(" ")[0], after.split(" ")[-1].split(",")
        if not dash or kind not in ("cgroup", "cgroup2") or len(before.split(" ")) < 5:
            continue
        if kind == "cgroup" and controller not in options:
            continue
        shown, point = (_unescaped(field) for field in before.split(" ")[3:5])
        yield (1 if kind == "cgroup" else 2), shown.rstrip("/"), Path(point)


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)


class CpuQuota(NamedTuple):
    """The CPU time of a control group, which its processes share.

    cpus: CPUs' worth of time that the group gets.
    group: a number of the group that is the same in all processes of a machine.
    """

    cpus: float
    group: int

    def threads(self, processes: int = 1) -> int:
        """Return the threads that each of `processes` in the group should have, at least 1.

        Every thread gets a CPU's time: when the group has used its time up, the system suspends all
        of it, even while threads wait for each other.
        """
        return max(1, math.floor(self.cpus / processes))


def cpu_quota() -> CpuQuota | None:
    """Return the tightest limit on this process's CPU time (`cpu.max`, `cpu.cfs_quota_us`)."""
    found = []
    for version, folder in folders("cpu"):
        try:
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                quota, period = ((folder / name).read_text().strip() for name in names)
            if quota not in ("max", "-1"):
                found.append(CpuQuota(int(quota) / int(period), folder.stat().st_ino))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(found, default=None)
