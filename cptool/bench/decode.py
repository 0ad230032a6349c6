"""Time per token over cached lengths, ranks and variants, compared with the cost model's prediction
and with the time to read the weights and the KV.

Rounds are interleaved as in `cptool.bench.prefill`.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from cptool.bench.ceilings import memory_rate
from cptool.bench.timing import summary
from cptool.calibration import measure as calibrate
from cptool.calibration.rig import check_room, prepare, random_model, smaller_worlds
from cptool.distributed.world import World
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.world_profile import world_profile
from cptool.model.config import LlamaConfig
from cptool.planning.cost.counts import kv_bytes, weight_bytes
from cptool.planning.cost.forward import Forward
from cptool.planning.hardware import HardwareProfile
from cptool.planning.prediction import Work, predicted_s
from cptool.planning.strategy import AUTO, Choice


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to measure: a model of `config`, its layers already cut, over every combination.

    cached: tokens of each of `batch` sequences before the first step; `steps` follow.
    """

    config: LlamaConfig
    dtype: str
    kv_dtype: str
    weights: str = "file"
    ranks: tuple[int, ...]
    cached: tuple[int, ...]
    variants: tuple[str, ...]
    batch: int
    steps: int
    repeats: int
    calibrated: bool = False


@dataclass(kw_only=True)
class _Runs:
    """The runs of N ranks at one cached length, and their times."""

    forward: Forward
    choices: dict[str, Choice]  # by the requested variant
    engine: Engine | None
    seconds: dict[str, list[float]] = field(default_factory=dict)  # per token, by variant
    exposed: dict[str, list[float]] = field(default_factory=dict)
    ways: dict[str, str] = field(default_factory=dict)  # the variant that the steps then used


def measure(world: World, sweep: Sweep) -> dict[str, object]:
    """Return the profile that `auto` chose by, the ceiling and one result per run. Collective."""
    dtype = getattr(torch, sweep.dtype)
    profile = calibrate(world, (sweep.dtype,)) if sweep.calibrated else world_profile(world)
    work = Work(
        config=sweep.config,
        dtype=sweep.dtype,
        kv_dtype=sweep.kv_dtype,
        new=[1] * sweep.batch,
        cached=[max(sweep.cached)] * sweep.batch,
        answer=sweep.steps,
    )
    check_room(world, work, profile, sweep.variants)
    model = random_model(sweep.config, dtype, world)
    worlds = smaller_worlds(world, list(sweep.ranks))
    weight = max(model.parameters(), key=lambda parameter: parameter.numel()).detach()
    ceiling: list[float] = []
    results: list[dict[str, Any]] = []
    for done, cached in enumerate(sweep.cached):
        world.report("measure decode, cached length", done, len(sweep.cached))
        runs = []
        for ranks in sweep.ranks:
            forward = Forward(
                config=sweep.config,
                dtype=sweep.dtype,
                kv_dtype=sweep.kv_dtype,
                new=sweep.batch,
                cached=sweep.batch * cached,
                ranks=ranks,
                active=ranks,
                batch=sweep.batch,
                tp=world.tp,
            )
            choices, engine, _ = prepare(
                model, worlds[ranks], forward, variants=sweep.variants, profile=profile
            )
            runs.append(_Runs(forward=forward, choices=choices, engine=engine))
        for repeat in range(sweep.repeats + 1):
            world.barrier()
            ceiling.append(min(world.gather(memory_rate(weight, wall=True))))
            for run in runs:
                _round(world, run, sweep, cached, keep=repeat > 0)
        for run in runs:
            results += _results(run, profile)
    rates = summary(ceiling[1:])
    for result in results:
        result["of_ceiling"] = result["bytes"] / rates["median"]
    return {
        "profile": dataclasses.asdict(profile),
        "ceilings": {"memory_of_a_rank": rates},
        "results": results,
    }


def _round(world: World, run: _Runs, sweep: Sweep, cached: int, keep: bool) -> None:
    for variant in run.choices:
        world.barrier()
        took = exposed = 0.0
        if run.engine is not None:
            took, exposed = _once(run.engine, variant, sweep.steps, cached)
            taken = run.engine.choice
            assert taken is not None, "a decode step has chosen"
            run.ways[variant] = taken.variant
        ranks = world.gather((took, exposed))
        if keep:
            took, exposed = (max(values) for values in zip(*ranks, strict=True))
            run.seconds.setdefault(variant, []).append(took)
            run.exposed.setdefault(variant, []).append(exposed)


def _once(engine: Engine, variant: str, steps: int, cached: int) -> tuple[float, float]:
    """Return seconds and exposed seconds per token over `steps` steps; then rewind the engine."""
    batch = len(engine.tokens)
    engine.extend([[] for _ in range(batch)], reserve=steps, variant=variant)  # what is pending
    exposed, began = engine.ring.exposed_s, time.perf_counter()
    decode(engine, AnswerOptions(limit=steps + 1), variant=variant)
    took = time.perf_counter() - began
    exposed = engine.ring.exposed_s - exposed
    engine.truncate([cached + 1] * batch)
    return took / steps, exposed / steps


def _results(run: _Runs, profile: HardwareProfile) -> list[dict[str, Any]]:
    forward = run.forward
    config, size = forward.config, forward.element
    medians = {variant: summary(times)["median"] for variant, times in run.seconds.items()}
    best = min(medians, key=lambda variant: medians[variant])
    # Each rank reads all its weights and its part of the KV.
    read = weight_bytes(config, size) + kv_bytes(
        config, forward.cached // forward.ranks, forward.kv_element
    )
    results = []
    for asked, choice in run.choices.items():
        predicted = predicted_s(choice, run.forward, profile)
        result = {
            "ranks": run.forward.ranks,
            "cached": forward.cached // forward.batch,
            "batch": forward.batch,
            "asked": asked,
            "variant": run.ways.get(asked, choice.variant),
            "active": choice.active,
            "ttit_seconds": summary(run.seconds[asked]),
            "tokens_per_s": forward.batch / medians[asked],
            "predicted_s": predicted,
            "predicted_over_measured": predicted / medians[asked],
            "exposed_seconds": summary(run.exposed[asked]),
            "bytes": read / forward.tp / medians[asked],
        }
        if asked == AUTO and run.forward.ranks > 1:
            result |= {
                "reason": choice.reason,
                "best": best,
                "regret": medians[asked] / medians[best] - 1,
            }
        results.append(result)
    return results
