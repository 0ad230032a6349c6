"""The memory of a run: refused beforehand where a rank may not take it, measured at its end."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cptool.errors import OptionError, UserError
from cptool.host import memory
from cptool.planning.cost.exchange import PASS_KV
from cptool.planning.cost.memory import RESERVED, in_words, memory_per_rank, remedies
from cptool.planning.prediction import Work, memory_of
from cptool.units import size, some

if TYPE_CHECKING:
    from cptool.distributed.world import World
    from cptool.engine.engine import Engine
    from cptool.engine.options import EngineOptions
    from cptool.planning.hardware import HardwareProfile

OPTIONS = ("chunk", "kv_dtype", "kv_memory")
"""What the commands that read prompts offer for less memory, beside more ranks."""

DRAFTS = "drafts"
"""The part of the memory of a run that a model takes which drafts."""


def limit(world: World, most: int | None = None) -> float:
    """Return the bytes that each rank may take in all, the least of all ranks. Collective.

    most: bytes that the user leaves a rank, if that is less.
    """
    return min(world.gather(rank_limit(world, most)))


def rank_limit(world: World, most: int | None = None) -> float:
    """Return the same of this rank: what it has, and its part of what is left on its machine or
    device.
    """
    if world.device.type == "cuda":
        import torch

        held: float = torch.cuda.memory_reserved(world.device)
        left: float = torch.cuda.mem_get_info(world.device)[0]
    else:
        held = memory.usage().held(world.local_size)
        try:
            left = memory.available() / world.local_size
        except OSError:  # the system does not report it
            left = math.inf
    found = held + (1 - RESERVED) * left
    return found if most is None else min(found, most)


def usage_now(world: World) -> float:
    """Return the bytes that this rank holds, of what the ranks of a machine share its part."""
    if world.device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(world.device)
    return memory.usage().held(world.local_size)


def peak(world: World) -> float:
    """Return the most bytes that this rank ever held so far, of what the ranks of a machine share
    its part.
    """
    if world.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(world.device)
    return memory.usage().most(world.local_size)


@dataclass(frozen=True, kw_only=True)
class Used:
    """The memory of a turn. parts: bytes of the fullest rank as predicted, by use. peak: the most
    that any rank held.
    """

    parts: dict[str, float]
    peak: float

    @property
    def predicted(self) -> float:
        """Bytes of the fullest rank at its peak."""
        return sum(self.parts.values())

    def fields(self) -> dict[str, object]:
        """Return the fields of the JSON of every command."""
        return {
            "memory_bytes_per_rank": round(self.predicted),
            "memory_parts_bytes": {name: round(count) for name, count in self.parts.items()},
            "peak_memory_bytes_per_rank": round(self.peak),
        }


def used(engine: Engine, work: Work, chunk: int, *, drafts: float = 0.0) -> Used:
    """Return what a turn took whose prompts were read in chunks of `chunk` tokens. Collective.

    drafts: bytes of a model that drafts.
    """
    parts = memory_of(work, engine.variant, engine.profile, chunk=chunk or None, limit=math.inf)
    parts |= {DRAFTS: drafts} if drafts else {}
    most = max(engine.peak_bytes, usage_now(engine.world))
    return Used(parts=parts, peak=max(engine.world.gather(most)))


def check(
    world: World,
    work: Work,
    profile: HardwareProfile,
    *,
    options: EngineOptions,
    offers: Collection[str] = OPTIONS,
    beside: float = 0.0,
    drafts: float = 0.0,
) -> None:
    """Raise UserError, one line, on all ranks if a rank would take more than it may. Collective.

    offers: the options that the caller's user has. beside: bytes that a rank holds and keeps which
        are no part of the work. drafts: those of a model that drafts.
    """
    _check_kv_memory(work, profile)
    most = limit(world, options.memory) - beside
    parts = memory_of(work, options.variant, profile, chunk=options.chunk, limit=most - drafts)
    parts |= {DRAFTS: drafts} if drafts else {}
    needed = sum(parts.values())
    if needed <= most:
        return
    tokens = sum(work.new) + sum(work.cached)
    what = some(tokens, "token") if tokens > 1 else "the model"
    shared = ""
    if world.device.type == "cpu" and world.local_size > 1:
        shared = f" of {world.local_size} on its machine"
    remedy = _remedies(work, parts, most, on_cpu=world.device.type == "cpu", offers=offers)
    raise UserError(
        f"{what}: a rank needs {size(needed)} ({in_words(parts)}), {size(needed - most)} more than "
        f"the {size(most)} that each{shared} may take; {remedy}"
    )


def _check_kv_memory(work: Work, profile: HardwareProfile) -> None:
    """Raise OptionError if two layers do not fit into what KV may take of a rank's memory."""
    if work.kv_memory is None:
        return
    forward = replace(work.forward, kv_memory=None)
    whole = memory_per_rank(PASS_KV.name, forward, profile, work.room)["kv"]
    two = 2 * whole / work.config.num_hidden_layers
    if work.kv_memory < min(two, whole):
        raise OptionError(
            "kv_memory",
            size(work.kv_memory),
            f"two layers of KV take {size(1.005 * two)} per rank",
            "give more, or use more ranks",
        )


def _remedies(
    work: Work, parts: dict[str, float], most: float, *, on_cpu: bool, offers: Collection[str]
) -> str:
    """Return what makes less of the memory needed, in words."""
    wide = on_cpu and "kv_dtype" in offers and (work.kv_dtype or work.dtype) == "float32"
    found = remedies(parts, most, chunks="chunk" in offers, wide=wide)
    if "kv_memory" in offers and on_cpu and parts["kv"] > most / 10:
        found.append("`kv_memory`")
    heavy = parts["weights"] > most / 2
    ranks = "more `tp` ranks" if heavy and not on_cpu else "more `cp` ranks"
    found.append(f"{ranks} on other machines" if on_cpu else ranks)
    if heavy and on_cpu:
        found.append("a smaller model")
    if parts.get(DRAFTS):
        found.append("another `draft`")
    listed = ", ".join(found[:-1])
    return f"use {listed} or {found[-1]}" if listed else f"use {found[-1]}"
