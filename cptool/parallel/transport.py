"""Which ring carries the messages of a context-parallel group."""

from __future__ import annotations

from cptool.distributed.group import Group
from cptool.parallel.ring import Ring
from cptool.parallel.shared_ring import SUPPORTED, SharedRing
from cptool.parallel.staged_ring import StagedRing


def ring_of(group: Group) -> Ring:
    """Return the ring of `group`. Collective, unless it is a group of one rank."""
    if group.process_group is None:
        return Ring(group)
    if group.staged:
        return StagedRing(group)
    on_cpu = group.device is None or group.device.type == "cpu"
    if on_cpu and SUPPORTED and not group.direct:
        return SharedRing(group)
    return Ring(group)
