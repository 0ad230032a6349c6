"""Which ring carries the messages of a rank's context-parallel group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cptool.parallel.ring import Ring
from cptool.parallel.shared_ring import SUPPORTED, SharedRing

if TYPE_CHECKING:
    from cptool.distributed.world import World
from cptool.parallel.staged_ring import StagedRing


def ring_of(world: World) -> Ring:
    """The transfers of this rank's context-parallel group."""
    if world.cp == 1:
        return Ring(None)
    if world.staged:
        return StagedRing(world.cp_group)
    if world.device.type == "cpu" and SUPPORTED and not world.direct:
        return SharedRing(world.cp_group)
    return Ring(world.cp_group)
