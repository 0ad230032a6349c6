"""What prefill and decode benches share: a model of random weights, random KV, and worlds of fewer
ranks inside the launched one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from cptool.distributed.devices import nccl_options
from cptool.distributed.group import Group
from cptool.distributed.world import World
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.setup.memory import check
from cptool.engine.state import Mark
from cptool.model.config import LlamaConfig
from cptool.model.llama import Llama
from cptool.parallel import tensor_parallel
from cptool.planning.cost.forward import Forward
from cptool.planning.hardware import HardwareProfile
from cptool.planning.prediction import Work
from cptool.planning.strategy import AUTO, Choice, choose
from cptool.sharding import balanced

VOCABULARY = 1024


def cut(config: LlamaConfig, layers: int) -> LlamaConfig:
    """Return `config` with at most `layers` layers and a small vocabulary: all layers take the same
    time, and embedding and output head are not part of the comparison.
    """
    return dataclasses.replace(
        config,
        num_hidden_layers=min(layers, config.num_hidden_layers),
        vocab_size=min(VOCABULARY, config.vocab_size),
    )


def check_room(world: World, work: Work, profile: HardwareProfile, variants: Sequence[str]) -> None:
    """Raise UserError on all ranks if one would take more memory than it may for `work` in one
    piece, on all ranks, with a random model and under any of the `variants`. Collective.
    """
    work = dataclasses.replace(work, ranks=world.cp, tp=world.tp, local=1)
    for variant in variants:
        options = EngineOptions(variant=variant, chunk=max(1, sum(work.new)))
        check(world, work, profile, options=options, offers=("kv_dtype",))


def random_model(config: LlamaConfig, dtype: torch.dtype, world: World) -> Llama:
    """Return a model, or this rank's part of it, whose parameters all repeat one block of noise."""
    model = Llama(config, device="meta", tp=world.tp)
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(1 << 20, generator=generator) * config.hidden_size**-0.5).to(dtype)
    for name, parameter in list(model.named_parameters()):
        filled = torch.empty(parameter.shape, dtype=dtype)
        flat = filled.view(-1)
        for start in range(0, flat.numel(), noise.numel()):
            piece = flat[start : start + noise.numel()]
            piece.copy_(noise[: piece.numel()])
        if parameter.dim() == 1:
            filled.fill_(1)
        owner, _, leaf = name.rpartition(".")
        setattr(
            model.get_submodule(owner),
            leaf,
            torch.nn.Parameter(filled.to(world.device), requires_grad=False),
        )
    model.place_frequencies(world.device)
    tensor_parallel.apply(model, world.tp_group)
    return model


def smaller_worlds(world: World, counts: list[int]) -> dict[int, World | None]:
    """Return the world of the first N x TP ranks for each N of `counts`; None if this rank is not
    in it.

    Collective over the launched world. Ranks keep their device and threads, so that results differ
    in the number of ranks alone.
    """
    worlds: dict[int, World | None] = {}
    for count in counts:
        if count == world.cp:
            worlds[count] = world
            continue
        tp_ranks = range(world.tp if count > 1 else 0)
        cp_group = _group_of(world, [range(t, count * world.tp, world.tp) for t in tp_ranks])
        group = cp_group if world.tp == 1 else world.tp_group
        if count > 1 and world.tp > 1:
            group = _group_of(world, [range(count * world.tp)])
        worlds[count] = None
        if world.cp_rank < count:
            worlds[count] = dataclasses.replace(
                world, size=count * world.tp, cp=count, group=group, cp_group=cp_group
            )
    return worlds


def _group_of(world: World, groups: list[range]) -> Group:
    """Make each group of ranks, and return this rank's; the group of one if it is in none of them.
    Collective over the launched world.
    """
    members, whole = None, world.group
    nccl = world.device.type == "cuda" and not whole.staged
    for ranks in groups:
        options = nccl_options(default_pg_timeout) if nccl else None
        made = dist.new_group(list(ranks), timeout=default_pg_timeout, pg_options=options)
        if world.rank in ranks:
            members = made
    return Group(members, whole.device, staged=whole.staged, direct=whole.direct)


@torch.inference_mode()
def hold(engine: Engine, cached: int) -> Mark:
    """Give each sequence `cached` tokens of random KV, dealt to the ranks in balance, and one more
    token whose KV is pending. Return this state, for `Engine.rewind`.
    """
    batch, ranks = len(engine.tokens), engine.world.cp
    placements = balanced([cached] * batch, ranks).placements()
    mine = placements[engine.world.cp_rank].to(engine.world.device)
    engine.cache.extend(mine)
    shape = (mine.tokens, engine.model.num_kv_heads, engine.model.config.head_dim)
    generator = torch.Generator().manual_seed(engine.world.rank)
    for layer in range(engine.cache.layers):
        k, v = (
            torch.randn(shape, generator=generator).to(engine.world.device, engine.dtype)
            for _ in range(2)
        )
        engine.cache.store(layer, k, v)
    engine.adopt([[0] * (cached + 1) for _ in range(batch)], placements)
    return engine.mark()


def prepare(
    model: Llama,
    part: World | None,
    forward: Forward,
    *,
    variants: tuple[str, ...],
    profile: HardwareProfile,
) -> tuple[dict[str, Choice], Engine | None, Mark | None]:
    """Prepare runs of `forward`, whose ranks are those of the world `part`.

    Return the choice by the requested variant (one rank has none but auto's), an engine that holds
    the cached tokens, and a mark of that state; on a rank without a part in it, the choices alone.
    """
    choices = {
        variant: choose(variant, forward, profile)
        for variant in (variants if forward.ranks > 1 else (AUTO,))
    }
    if part is None:
        return choices, None, None
    options = EngineOptions(kv_dtype=forward.kv_dtype or "auto")
    engine = Engine(model, part, batch=forward.batch, options=options, profile=profile)
    return choices, engine, hold(engine, forward.cached // forward.batch)
