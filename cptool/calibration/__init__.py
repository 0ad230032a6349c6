"""Measuring a hardware profile on the ranks as they were launched.

As many ranks as the processors serve at the full rate measure at the same time, as they do at work,
so that they share cores, memory and links in the same way. Each time is the median of several
repetitions on the slowest rank. The fixed cost of a layer is measured for every number of ranks,
including those that take turns on the processors.
"""

from __future__ import annotations

import dataclasses
import datetime
import os

import torch

from cptool.calibration.attention import attention_rates
from cptool.calibration.clock import Clock, ComputeClock, Log
from cptool.calibration.examples import EXAMPLE
from cptool.calibration.linear import device_rates, row_rates, stored_rates, tiny_layer
from cptool.calibration.link import link_rates
from cptool.calibration.overheads import with_overheads
from cptool.calibration.rig import smaller_worlds
from cptool.calibration.small_ops import positions, reordering, small_op, tokenwise
from cptool.distributed.world import World
from cptool.engine.world_profile import usable_processors
from cptool.host.processor import cpu_model
from cptool.ops.processor import instruction_set
from cptool.planning.cost.rates import IN_CACHES
from cptool.planning.hardware import MEASURED, PARTS, HardwareProfile, Measurement
from cptool.planning.linear_rates import RowRates
from cptool.planning.profiles import default_profile
from cptool.planning.strategy import fit_rule

MUCH = 16 * IN_CACHES
"""Bytes that are reordered, half of them the new order: KV of all ranks, which no cache keeps."""

OVERHEAD_REPEATS = 10
"""Factor on the repetitions of the small costs, whose times vary more than the rest."""


@torch.inference_mode()
def measure(
    world: World, dtypes: tuple[str, ...], repeats: int = 7, *, load: float | None = None
) -> HardwareProfile:
    """Measure the profile of this world's ranks, the same on each; the link needs two ranks.

    Rates of dtypes that are not measured keep the default's ratio to the first measured dtype.
    load: the load average per processor just before, which the profile states. Collective.
    """
    device, threads = world.device.type, torch.get_num_threads()
    machines = world.size // world.local_size
    at_once = None
    if device == "cpu":
        at_once = max(1, usable_processors(world) // threads)
    counts = _counts(world, at_once)
    worlds = smaller_worlds(world, counts)
    fitting = max(n for n in counts if n <= (at_once or world.cp) or n == counts[0])
    alone = device == "cpu" and world.tp == 1 and fitting > 1
    log = Log(world, _measurements(world, len(dtypes), len(worlds), alone=alone))
    clock = ComputeClock(world, worlds[fitting], repeats, log)
    clocks: dict[int, Clock] = {fitting: clock}
    if alone:
        clocks = {1: ComputeClock(world, smaller_worlds(world, [1])[1], repeats, log), **clocks}
    default = (
        default_profile(device, instruction_set()) if device == "cpu" else default_profile(device)
    )
    profile = dataclasses.replace(
        default,
        name=f"{MEASURED}{world.size} {device} rank{'s' * (world.size > 1)}",
        position_s=positions(clock),
        op_overhead_s=small_op(clock),
        touch_bandwidth=reordering(clock, IN_CACHES),
        moving_bandwidth=reordering(clock, MUCH) if device == "cpu" else None,
        ranks_per_host=world.local_size if machines > 1 else None,
        ranks_at_once=at_once,
        stored=stored_rates(clock) if device == "cpu" else None,
        tokenwise_bandwidth={},
        notes={},
        peak_flops={},  # the default's may be of another device
    )
    if at_once is not None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / at_once
        profile = dataclasses.replace(profile, threads=threads, memory_bytes=memory)
    for done, name in enumerate(dtypes):
        profile = _compute(clocks, profile, default, name, first=done == 0)
    if world.cp > 1:
        joined = worlds[fitting if fitting > 1 else counts[-1]]
        profile = _with_link(profile, Clock(world, joined, repeats, log), joined)
    many = OVERHEAD_REPEATS * repeats
    profile = with_overheads(world, worlds, profile=profile, dtype=dtypes[0], repeats=many, log=log)
    profile = dataclasses.replace(
        profile,
        rule=fit_rule(EXAMPLE, dtypes[0], max(2, world.cp), profile),
        measurement=Measurement(
            date=datetime.date.today().isoformat(),
            machine=cpu_model() if device == "cpu" else torch.cuda.get_device_name(),
            load=load,
            spread=log.spread,
            dtypes=dtypes,
        ),
    )
    return world.gather(profile, *PARTS)[0]


def _measurements(world: World, dtypes: int, worlds: int, *, alone: bool) -> int:
    """Return how many measurements `measure` makes: calls of a clock."""
    small, tiny, tokenwise, attention, link = 3, 1, 1, 3, 5
    on_cpu = world.device.type == "cpu"
    linear = 1 + alone if on_cpu else 3
    each = dtypes * (tokenwise + linear + attention)
    return small + 2 * on_cpu + tiny + each + link * (world.cp > 1) + worlds


def _with_link(profile: HardwareProfile, clock: Clock, part: World | None) -> HardwareProfile:
    """Return `profile` with the measured link, of one host or between several."""
    link, steals = link_rates(clock, part)
    profile = dataclasses.replace(profile, transfer_steals=steals)
    if clock.world.size > clock.world.local_size:
        return dataclasses.replace(profile, network=link)
    return dataclasses.replace(profile, host_link=link)


@torch.inference_mode()
def measure_more_ranks(
    world: World, dtypes: tuple[str, ...], profile: HardwareProfile, repeats: int = 7
) -> HardwareProfile:
    """Return `profile`, measured on fewer ranks, with what variants cost beyond it on these.

    Ranks that take turns may not be bound to cores, which would distort all other figures.
    Collective.
    """
    here = profile.for_ranks(torch.get_num_threads(), usable_processors(world))
    many = OVERHEAD_REPEATS * repeats
    more = with_overheads(
        world,
        {world.cp: world},
        profile=here,
        dtype=dtypes[0],
        repeats=many,
        log=Log(world, total=1),
    )
    both = dataclasses.replace(
        profile,
        residual_s={**profile.residual_s, **more.residual_s},
        start_s={**profile.start_s, **more.start_s},
    )
    return world.gather(both, *PARTS)[0]


def _counts(world: World, at_once: int | None) -> list[int]:
    """Return the numbers of ranks to measure, ascending: powers of two, and all."""
    powers = [1 << n for n in range(1, world.cp.bit_length()) if 1 << n < world.cp]
    if at_once == 1:
        powers = [1, *powers]
    # TP ranks always compute together, so with them only the whole world is measured.
    return sorted({*powers, world.cp}) if world.tp == 1 else [world.cp]


def _compute(
    clocks: dict[int, Clock],
    profile: HardwareProfile,
    default: HardwareProfile,
    name: str,
    first: bool,
) -> HardwareProfile:
    """Return `profile` with the measured rates of linear layers and attention in a dtype.

    clocks: by the number of ranks that compute, ascending; the rates are those of the most ranks.
    first: whether this is the first dtype, which also sets the memory's rates and scales the rates
    of dtypes that are not measured.
    """
    clock = clocks[max(clocks)]
    if first:
        tiny = tiny_layer(clock, name)
        profile = dataclasses.replace(profile, layer_overhead_s=tiny)
    moved = tokenwise(clock, name)
    profile = dataclasses.replace(
        profile, tokenwise_bandwidth={**profile.tokenwise_bandwidth, name: moved}
    )
    by_rows: tuple[RowRates, ...] = ()
    if clock.device.type == "cpu":
        found = [row_rates(clock, ranks, name, tokenwise=moved) for ranks, clock in clocks.items()]
        by_rows = tuple(rates for rates, _ in found)
        rate, weights = found[-1][0].flops_of_many, found[-1][1]
    else:
        rate, weights = device_rates(clock, name, profile.layer_overhead_s, tokenwise=moved)
    pairs, reading = attention_rates(clock, getattr(torch, name))
    linear, attention = dict(profile.linear_flops), dict(profile.attention_flops)
    if first:
        profile = dataclasses.replace(profile, memory_bandwidth=weights, **reading)
        scales = rate / default.linear_flops[name], pairs / default.attention_flops[name]
        linear = {other: scales[0] * value for other, value in linear.items()}
        attention = {other: scales[1] * value for other, value in attention.items()}
    linear[name], attention[name] = rate, pairs
    return dataclasses.replace(
        profile,
        linear_flops=linear,
        attention_flops=attention,
        row_rates={**profile.row_rates, name: by_rows},
    )
