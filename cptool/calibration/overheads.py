"""Measuring the fixed costs of forwards and layers, by number of ranks and variant."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from itertools import cycle

import torch

from cptool.calibration.clock import Clock, Log
from cptool.calibration.examples import COLD_BYTES, TINY
from cptool.calibration.rig import hold, random_model
from cptool.distributed.world import World
from cptool.engine.answers.decode import next_tokens
from cptool.engine.engine import Engine
from cptool.engine.sampling import Sampling
from cptool.engine.state import Mark
from cptool.model.layer import DecoderLayer
from cptool.planning.cost.forward import Forward
from cptool.planning.cost.layer import predict
from cptool.planning.hardware import HardwareProfile
from cptool.variants import names

FEW_LAYERS, MORE_LAYERS, HELD = 2, 8, 64
PAUSE_S, PIECE = 200e-6, 1 << 12
"""Roughly the time that a layer of a small model computes between two exchanges: long enough for
waiting ranks to go to sleep; and how many floats it reads at a time meanwhile."""


def with_overheads(
    world: World,
    worlds: dict[int, World | None],
    profile: HardwareProfile,
    dtype: str,
    repeats: int,
    log: Log,
) -> HardwareProfile:
    """Return `profile` with the cost of a forward once, and with what forwards and layers of each
    variant cost beyond the rest of the profile when they have next to nothing to compute.

    A whole engine runs a tiny model of few and of more layers: the difference is the layers' cost,
    the rest the forward's. On a CPU its layers read memory as if they computed, because ranks that
    sleep respond later than those that have just begun to wait, and because weights drive code and
    data of the small steps out of the caches.
    """
    pause = PAUSE_S if world.device.type == "cpu" else 0.0
    busy = _Reading() if pause else None
    once: dict[int, dict[str, tuple[float, float]]] = {}
    residual: dict[str, dict[str, tuple[float, float]]] = {}
    # Without `row_rates`, which describe layers whose products take time.
    here = dataclasses.replace(profile, residual_s={}, start_s={}, row_rates={})
    for count, part in worlds.items():
        clock = Clock(world, part, repeats, log)
        works: dict[str, Callable[[], object]] = {}
        for layers in (FEW_LAYERS, MORE_LAYERS):
            config = dataclasses.replace(TINY, num_hidden_layers=layers)
            engine = mark = None
            if part is not None:
                model = random_model(config, getattr(torch, dtype), part)
                if busy is not None:
                    for layer in model.layers:
                        layer.register_forward_pre_hook(busy)
                engine = Engine(model, part, profile=here)
                mark = hold(engine, HELD)
            for variant in _measured(count):
                for new in (1, 2 * count):
                    works[f"{variant} {new} {layers}"] = _forward(engine, mark, variant, new)
        times = clock.all(works)
        found: dict[str, tuple[float, float]] = {}
        started: dict[str, tuple[float, float]] = {}
        for variant in _measured(count):
            costs = [
                _cost(times, variant, new, count=count, profile=here, dtype=dtype, pause=pause)
                for new in (1, 2 * count)
            ]
            found[variant] = (costs[0][0], costs[1][0])
            started[variant] = (costs[0][1], costs[1][1])
        once[count] = started
        if count > 1:
            residual[str(count)] = found
    undisturbed = [
        start
        for count, started in once.items()
        if count <= (profile.ranks_at_once or count)
        for pair in started.values()
        for start in pair
    ]
    if undisturbed:
        usual = statistics.median(undisturbed)
        profile = dataclasses.replace(profile, forward_overhead_s=usual)
    usual = profile.forward_overhead_s
    beside = {
        str(count): {variant: (a - usual, b - usual) for variant, (a, b) in started.items()}
        for count, started in once.items()
        if count > 1
    }
    return dataclasses.replace(profile, residual_s=residual, start_s=beside)


def _cost(
    times: dict[str, float],
    variant: str,
    new: int,
    *,
    count: int,
    profile: HardwareProfile,
    dtype: str,
    pause: float,
) -> tuple[float, float]:
    """Return the seconds that a layer takes beyond the profile's, and that a forward takes once."""
    few, more = (times[f"{variant} {new} {layers}"] for layers in (FEW_LAYERS, MORE_LAYERS))
    each = max(0.0, more - few) / (MORE_LAYERS - FEW_LAYERS)
    forward = Forward(config=TINY, dtype=dtype, new=new, cached=HELD, ranks=count, active=count)
    paused = pause * max(1.0, forward.sources / (profile.ranks_at_once or count))
    beyond = each - paused - predict(variant, forward, profile).seconds
    return beyond, max(0.0, few - FEW_LAYERS * each)


def _measured(ranks: int) -> tuple[str, ...]:
    """Return the variants to measure; all are the same on one rank."""
    every = names(baselines=True)
    return every if ranks > 1 else every[:1]


class _Reading:
    """Has the core of a rank that has tokens read what no cache holds, before each layer."""

    def __init__(self) -> None:
        memory = torch.zeros(COLD_BYTES // 4)
        self._pieces = cycle(memory.split(PIECE))

    def __call__(self, _: DecoderLayer, inputs: tuple) -> None:
        end = time.perf_counter() + (PAUSE_S if inputs[0].shape[0] else 0.0)
        while time.perf_counter() < end:
            next(self._pieces).sum()


def _forward(
    engine: Engine | None, mark: Mark | None, variant: str, new: int
) -> Callable[[], object]:
    """Return the work of one forward of `new` tokens over those that `mark` holds.

    Without an engine it does nothing: the clock never calls it on a rank that has no part.
    """

    def work() -> None:
        if engine is None or mark is None:
            return
        engine.rewind(mark)
        engine.extend([[1] * (new - 1)], variant=variant)
        next_tokens(engine, Sampling())

    return work
