"""Affinity of CPU ranks: which cores each rank runs on, and how many threads it has.

Ranks of a machine that may all run on the same cores divide them: each is bound to its own cores,
next to each other on a NUMA node, so that no rank's threads alternate with another's on a core or
move away from their memory. If there are more ranks than cores, the same number of ranks shares
each core. If something else has already given ranks different cores (the binding of srun or mpirun,
numactl, the cgroups of containers), that binding stays, and no core is divided a second time. If
control groups limit CPU time, the ranks together have no more threads than the limit gives CPUs, or
one thread each.
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
    """One rank's part of a machine.

    cpus: the CPUs to bind the rank to; None leaves its affinity unchanged.
    threads: its number of threads.
    """

    cpus: frozenset[int] | None
    threads: int


class Place(NamedTuple):
    """Where a rank runs: its machine, the CPUs that it may use, and the limit on their time."""

    machine: str
    cpus: frozenset[int]
    quota: CpuQuota | None


def places(gather: Callable[[Any], list[Any]]) -> list[Place]:
    """Return the place of every rank, in rank order. Collective.

    gather: returns the values that all ranks pass to it, in rank order.
    """
    return [
        Place(name, frozenset(cpus), quota and CpuQuota(*quota))
        for name, cpus, quota in gather((machine(), sorted(usable_cpus()), cpu_quota()))
    ]


def usable_cpus() -> frozenset[int]:
    """Return the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def core_of(cpu: int) -> tuple[int, str]:
    """Return the NUMA node and the physical core of a CPU; hardware threads of a core share it."""
    try:
        core = (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        core = str(cpu)
    nodes = [int(path.name[4:]) for path in (_CPUS / f"cpu{cpu}").glob("node[0-9]*")]
    return min(nodes, default=0), core


def cores() -> int:
    """Return the number of physical cores that this process may run on, or less if a control group
    limits its CPU time.
    """
    count, quota = len({core_of(cpu) for cpu in usable_cpus()}), cpu_quota()
    return count if quota is None else min(count, quota.threads())


def processors(ranks: Sequence[Place]) -> int:
    """Return the number of CPUs that `ranks` can keep busy together."""
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
    """Return the share of one rank of a machine.

    usable: usable[r] is the set of CPUs that rank r may run on.
    core: returns the NUMA node and the core of a CPU.

    Ranks with the same CPUs divide the cores among them. If there are more ranks than cores, each
    has one thread. If the ranks are then a multiple of the cores, they are dealt to the cores in
    turn, so that the first few ranks, which alone work on a short prompt, do not share a core. If
    they are not, some cores would have more work than others, and no rank is bound.
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
    """Bind this rank to its cores and return its number of threads. Collective over all ranks.

    gather: returns the values that all ranks pass to it, in rank order; this is rank `rank`.
    threads: the number requested, None for this rank's share. A rank with more threads than its
        share is not bound.

    CPTOOL_BIND=none in the environment leaves the affinity of all ranks unchanged. Raises UserError
    for any value other than auto and none.
    """
    binding = os.environ.get("CPTOOL_BIND") or "auto"
    if binding not in ("auto", "none"):
        raise UserError(f"CPTOOL_BIND is {binding!r}; it must be auto or none")
    found = places(gather)
    own = found[rank]
    here = [r for r, place in enumerate(found) if place.machine == own.machine]
    share = divide([found[r].cpus for r in here], here.index(rank))
    wanted = threads or share.threads
    if not threads and own.quota is not None:
        sharing = sum(found[r].quota == own.quota for r in here)
        wanted = min(wanted, own.quota.threads(sharing))
    if binding == "auto" and share.cpus is not None and wanted <= share.threads:
        os.sched_setaffinity(0, share.cpus)
    return wanted


def machine() -> str:
    """Return an identifier that all ranks of a machine share, even from different containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
