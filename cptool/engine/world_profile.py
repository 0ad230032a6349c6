"""The hardware profile that all ranks of a world use."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from cptool.host import memory
from cptool.ops.processor import instruction_set
from cptool.planning.hardware import PARTS, HardwareProfile
from cptool.planning.profiles import load_profile

if TYPE_CHECKING:
    from cptool.distributed.options import RankOptions
    from cptool.distributed.world import World


def machine_profile(device: str) -> HardwareProfile:
    """Return what was measured of this machine's `device` ("cpu" or "cuda"), else the defaults of
    its kind: of a CPU, those of the instruction set in use.

    Raises UserError if the file of measured profiles is damaged.
    """
    return load_profile(device, instruction_set()) if device == "cpu" else load_profile(device)


def with_memory_of_here(profile: HardwareProfile) -> HardwareProfile:
    """Return a profile of this machine's CPU with the memory that the machine has by now, or that
    this process's control groups allow; those of other devices are returned as they are.
    """
    if profile.device != "cpu":
        return profile
    try:
        whole = memory.total()
    except OSError:
        return profile
    return dataclasses.replace(profile, memory_bytes=whole / (profile.ranks_at_once or 1))


def world_profile(world: World) -> HardwareProfile:
    """Return the profile that all ranks of `world` use: rank 0's, for the threads that ranks have.

    Collective. Raises UserError if the file is damaged.
    """
    import torch

    profile = machine_profile(world.device.type).for_ranks(
        torch.get_num_threads(), usable_processors(world) // world.tp
    )
    # The threads too are those of rank 0: ranks whose profiles differ would choose differently.
    return world.gather(profile, *PARTS)[0]


def usable_processors(world: World) -> int:
    """Return how many processors the ranks of `world` may run on in total. Collective.

    Each rank may be bound to some of them.
    """
    from cptool.host import affinity

    return affinity.processors(affinity.places(world.gather))


def local_profile(ranks: RankOptions) -> HardwareProfile:
    """Return the profile that ranks will use that this process starts on its machine.

    ranks: with `device` resolved. Raises UserError if the file is damaged.
    """
    from cptool.host import affinity

    threads = ranks.threads or max(1, affinity.cores() // ranks.count)
    places = affinity.places(lambda place: [place])
    return machine_profile(ranks.device).for_ranks(threads, affinity.processors(places) // ranks.tp)
