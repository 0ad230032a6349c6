"""Time to the first token over contexts, miss rates, ranks and variants, compared with the cost
model's prediction, and what `auto` loses by its choice.

All ranks of the launched world take part in every round: the variants of all N are interleaved, so
that drift of the machine affects them alike, and the ranks beyond N wait.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from cptool.bench.ceilings import matmul_rate
from cptool.bench.timing import summary
from cptool.calibration import measure as calibrate
from cptool.calibration.rig import check_room, prepare, random_model, smaller_worlds
from cptool.distributed.world import World
from cptool.engine.answers.decode import next_tokens
from cptool.engine.engine import Engine
from cptool.engine.sampling import Sampling
from cptool.engine.state import Mark
from cptool.engine.world_profile import world_profile
from cptool.model.config import LlamaConfig
from cptool.planning.cost.counts import attention_flops, linear_flops
from cptool.planning.cost.forward import Forward
from cptool.planning.hardware import HardwareProfile
from cptool.planning.prediction import Work, predicted_s
from cptool.planning.strategy import AUTO, Choice


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to measure: a model of `config`, its layers already cut, over every combination.

    contexts: tokens in all, T + P. miss_rates: T / (T + P). variants: used where there is more than
    one rank; one rank has nothing to choose. repeats: the fewest rounds per cell; more follow until
    the cell has taken `seconds`. calibrated: whether the profile is measured first, on these ranks.
    """

    config: LlamaConfig
    dtype: str
    kv_dtype: str
    weights: str = "file"
    ranks: tuple[int, ...]
    contexts: tuple[int, ...]
    miss_rates: tuple[float, ...]
    variants: tuple[str, ...]
    repeats: int
    seconds: float = 0.0
    calibrated: bool = False


@dataclass(kw_only=True)
class _Runs:
    """The runs of one cell, N ranks at one context and miss rate, and their times."""

    forward: Forward
    choices: dict[str, Choice]  # by the requested variant
    engine: Engine | None
    mark: Mark | None
    seconds: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    exposed: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    sent: dict[tuple[str, int], int] = field(default_factory=dict)


def measure(world: World, sweep: Sweep) -> dict[str, object]:
    """Return the profile that `auto` chose by, the ceiling and one result per run. Collective."""
    dtype = getattr(torch, sweep.dtype)
    profile = calibrate(world, (sweep.dtype,)) if sweep.calibrated else world_profile(world)
    longest = max(sweep.contexts)
    new = max(1, round(max(sweep.miss_rates) * longest))
    work = Work(
        config=sweep.config,
        dtype=sweep.dtype,
        kv_dtype=sweep.kv_dtype,
        new=[new],
        cached=[longest - new],
    )
    check_room(world, work, profile, sweep.variants)
    model = random_model(sweep.config, dtype, world)
    worlds = smaller_worlds(world, list(sweep.ranks))
    cells = [(context, miss) for context in sweep.contexts for miss in sweep.miss_rates]
    ceiling: list[float] = []
    results: list[dict[str, Any]] = []
    for done, (context, miss) in enumerate(cells):
        world.report("measure prefill, cell", done, len(cells))
        new = max(1, round(miss * context))
        runs = []
        for ranks in sweep.ranks:
            forward = Forward(
                config=sweep.config,
                dtype=sweep.dtype,
                kv_dtype=sweep.kv_dtype,
                new=new,
                cached=context - new,
                ranks=ranks,
                active=ranks,
                tp=world.tp,
            )
            choices, engine, mark = prepare(
                model, worlds[ranks], forward, variants=sweep.variants, profile=profile
            )
            runs.append(_Runs(forward=forward, choices=choices, engine=engine, mark=mark))
        began, repeat = time.perf_counter(), 0
        while repeat <= sweep.repeats or _lasted(world, began) < sweep.seconds:
            world.barrier()
            ceiling.append(min(world.gather(matmul_rate(dtype, world.device.type))))
            for run in runs:
                _round(world, run, new, keep=repeat > 0)
            repeat += 1
        for run in runs:
            results += _results(run, profile)
    rates = summary(ceiling[1:])
    for result in results:
        result["of_ceiling"] = result["flops"] / result["ranks"] / world.tp / rates["median"]
    return {
        "profile": dataclasses.asdict(profile),
        "ceilings": {"matmul_of_a_rank": rates},
        "results": results,
    }


def _lasted(world: World, began: float) -> float:
    """Return the seconds since `began` on the slowest rank, the same on every rank. Collective."""
    return max(world.gather(time.perf_counter() - began))


def _round(world: World, run: _Runs, new: int, *, keep: bool) -> None:
    """Run each distinct choice once: what auto picks is often one of the requested variants."""
    for key, choice in {(c.variant, c.active): c for c in run.choices.values()}.items():
        world.barrier()
        took = exposed = sent = 0.0
        if run.engine is not None and run.mark is not None:
            took, exposed, sent = _once(run.engine, run.mark, choice, new)
        ranks = world.gather((took, exposed, sent))
        if keep:
            took, exposed, sent = (max(values) for values in zip(*ranks, strict=True))
            run.seconds.setdefault(key, []).append(took)
            run.exposed.setdefault(key, []).append(exposed)
            run.sent[key] = sent


def _once(engine: Engine, mark: Mark, choice: Choice, new: int) -> tuple[float, float, int]:
    """Return the seconds to the first token, those of them exposed, and the bytes sent."""
    ring = engine.ring
    engine.rewind(mark)
    exposed, sent = ring.exposed_s, ring.sent_bytes
    # Only auto leaves ranks without new tokens.
    variant = choice.variant if choice.active == engine.world.cp else AUTO
    began = time.perf_counter()
    engine.extend([[1] * (new - 1)], variant=variant)
    next_tokens(engine, Sampling())
    took = time.perf_counter() - began
    return took, ring.exposed_s - exposed, ring.sent_bytes - sent


def _results(run: _Runs, profile: HardwareProfile) -> list[dict[str, Any]]:
    config, new, cached = run.forward.config, run.forward.new, run.forward.cached
    flops = linear_flops(config, new, 1) + attention_flops(config, new, cached)
    medians = {key: summary(times)["median"] for key, times in run.seconds.items()}
    best = min(medians, key=lambda key: medians[key])
    results = []
    for asked, choice in run.choices.items():
        key = (choice.variant, choice.active)
        predicted = predicted_s(choice, run.forward, profile)
        result = {
            "ranks": run.forward.ranks,
            "context": new + cached,
            "tokens": new,
            "cached": cached,
            "miss_rate": new / (new + cached),
            "asked": asked,
            "variant": choice.variant,
            "active": choice.active,
            "ttft_seconds": summary(run.seconds[key]),
            "predicted_s": predicted,
            "predicted_over_measured": predicted / medians[key],
            "exposed_seconds": summary(run.exposed[key]),
            "sent_bytes": run.sent[key],
            "flops": flops / medians[key],
        }
        if asked == AUTO and run.forward.ranks > 1:
            result |= {
                "reason": choice.reason,
                "best": list(best),
                "regret": medians[key] / medians[best] - 1,
            }
        results.append(result)
    return results
