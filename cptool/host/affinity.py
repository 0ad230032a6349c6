"""Which cores a CPU rank runs on, and how many threads that makes.

Ranks of a machine that may all run on the same cores divide them: each is bound to its own, next to
each other on a NUMA node, so that no rank's threads take turns with another's or lose their memory
to a move. Ranks that must take turns do so on one core, as many on each. Where something else has
given ranks different cores already (srun's or mpirun's binding, numactl, the cgroups of
containers), that stays, and no core is divided a second time. Where control groups limit the time
on CPUs, ranks have no more threads in all than that gives CPUs, or one each.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cptool.errors import UserError
from cptool.host.control_groups import CpuQuota, cpu_quota

_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Share:
    """Of one rank: `cpus` to bind it to, None to leave it where it is, and its threads."""

    cpus: frozenset[int] | None
    threads: int


class Place(NamedTuple):
    """Where a rank is: its machine, the CPUs that it may run on, and the limit on their time."""

    machine: str
    cpus: frozenset[int]
    quota: CpuQuota | None


def places(gather: Callable[[Any], list[Any]]) -> list[Place]:
    """The place of every rank, in order. Collective: `gather` returns the values of all ranks."""
    return [
        Place(name, frozenset(cpus), quota and CpuQuota(*quota))
        for name, cpus, quota in gather((machine(), sorted(usable_cpus()), cpu_quota()))
    ]


def usable_cpus() -> frozenset[int]:
    """The CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def core_of(cpu: int) -> tuple[int, str]:
    """The NUMA node and the physical core of a CPU: two threads of one core share its units."""
    try:
        core = (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        core = str(cpu)
    nodes = [int(path.name[4:]) for path in (_CPUS / f"cpu{cpu}").glob("node[0-9]*")]
    return min(nodes, default=0), core


def cores() -> int:
    """Physical cores that this process may run on, or fewer where a control group limits the time
    on them.
    """
    count, quota = len({core_of(cpu) for cpu in usable_cpus()}), cpu_quota()
    return count if quota is None else min(count, quota.threads())


def processors(ranks: Sequence[Place]) -> int:
    """CPUs that ranks can keep busy together."""
    groups: dict[tuple[str, CpuQuota | None], set[int]] = {}
    for name, cpus, quota in ranks:
        groups.setdefault((name, quota), set()).update(cpus)
    free = {(name, cpu) for (name, quota), cpus in groups.items() if not quota for cpu in cpus}
    limited = (min(len(cpus), quota.threads()) for (_, quota), cpus in groups.items() if quota)
    return len(free) + sum(limited)


def divide(
    usable: Sequence[frozenset[int]],
    rank: int,
    core: Callable[[int], tuple[int, Any]] = core_of,
) -> Share:
    """The share of `rank` of those on a machine; usable[r]: the CPUs that rank r may run on.

    Ranks with the same CPUs divide the cores among them. Of more ranks than cores each has one
    thread, and if they are a multiple, its core: rank after rank, so that the first few, which a
    short prompt is left to, do not take turns. If not, some cores would have more to do than
    others, and nobody is bound.
    """
    mine = usable[rank]
    overlapping = [r for r, cpus in enumerate(usable) if cpus & mine]
    cores: dict[tuple[int, Any], set[int]] = {}
    for cpu in sorted(mine):
        cores.setdefault(core(cpu), set()).add(cpu)
    count, ranks = len(cores), len(overlapping)
    uneven = count < ranks and ranks % count
    if ranks == 1 or uneven or any(usable[r] != mine for r in overlapping):
        return Share(None, max(1, count // ranks))
    # By node, then by the first CPU of a core.
    ordered = sorted(cores, key=lambda key: (key[0], min(cores[key])))
    place = overlapping.index(rank)
    if count < ranks:
        return Share(frozenset(cores[ordered[place % count]]), 1)
    own = ordered[place * count // ranks : (place + 1) * count // ranks]
    return Share(frozenset().union(*(cores[key] for key in own)), len(own))


def bind(gather: Callable[[Any], list[Any]], rank: int, threads: int | None) -> int:
    """Binds this rank and returns the threads that it is to have; collective over all ranks.

    gather: the values of all ranks, in order, of which this one is `rank`. threads: as asked for;
    a rank that is to have more than its cores is not bound. CPTOOL_BIND=none in the environment
    leaves all ranks where they are. Raises UserError for another value.
    """
    asked = os.environ.get("CPTOOL_BIND") or "auto"
    if asked not in ("auto", "none"):
        raise UserError(f"CPTOOL_BIND is {asked!r}; it must be auto or none")
    found = places(gather)
    own = found[rank]
    here = [r for r, place in enumerate(found) if place.machine == own.machine]
    share = divide([found[r].cpus for r in here], here.index(rank))
    wanted = threads or share.threads
    if not threads and own.quota is not None:
        sharing = sum(found[r].quota == own.quota for r in here)
        wanted = min(wanted, own.quota.threads(sharing))
    if asked == "auto" and share.cpus is not None and wanted <= share.threads:
        os.sched_setaffinity(0, share.cpus)
    return wanted


def machine() -> str:
    """What ranks of one machine have in common, whatever their containers call it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
