"""Measures a hardware profile on the ranks as they were launched.

As many ranks as the processors serve at the full rate measure at the same time, because that is how
they work: what cores, memory or links share, they share here too. Each time is the median of some
repetitions on the slowest rank. What a layer costs whatever its tokens is measured on all numbers
of ranks, those included that take turns.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable
from itertools import cycle

import torch

from cptool import large_pages, tokenwise
from cptool.bench.forward import hold, random_model, rewind, smaller_worlds
from cptool.cost import ELEMENT_BYTES, Forward, predict
from cptool.cost.layer import elementwise_bytes
from cptool.distributed import World
from cptool.engine import Engine
from cptool.hardware import MEASURED, HardwareProfile, Link, default_profile, usable_processors
from cptool.model.config import LlamaConfig
from cptool.model.llama import DecoderLayer
from cptool.model.rows import ROWS_AT_ONCE_CPU
from cptool.model.shapes import llama_config
from cptool.ops import attention_partial, cpu_stream_rows
from cptool.ring import Ring
from cptool.row_rates import RowRates, fitted
from cptool.sampling import Sampling
from cptool.sharding import Placement, balanced, union
from cptool.staged import ring_of
from cptool.strategy import fit_rule

# A GQA model of common proportions: the layer that is timed, and the model on which the rule's
# coefficients are fitted.
EXAMPLE = llama_config(1024, 8, 8, 2, 3072, context=131072, tied=True)
# Half of its widths, by which what a layer costs whatever its widths is told from the rest.
HALF = llama_config(512, 8, 4, 1, 1536, context=131072, tied=True)
# One whose every product takes no time.
TINY = llama_config(64, 8, 2, 1, 64, vocab=64, head_dim=64, context=131072, tied=True)
ROWS = 512
"""Rows of products that are bound by arithmetic."""
MOST_ROWS = ROWS_AT_ONCE_CPU
"""Of the layers that a CPU is timed at: more go through the feed-forward network in pieces."""
BLOCK = 16
"""Queries of a block for which a CPU packs keys and values, as for many: of EXAMPLE 64 rows of a KV
head."""
COLD_BYTES = 128 << 20
"""What is read between two uses of weights or of keys, so that no cache keeps them: those of a
model with many layers come from memory every time."""
SMALL_MESSAGE, LARGE_MESSAGE = 1 << 10, 4 << 20
FEW_LAYERS, MORE_LAYERS, HELD = 2, 8, 64
OVERHEAD_REPEATS = 10
"""Small costs want more repetitions than the rest, that many times as many."""
PAUSE_S = 200e-6
"""What a layer of a small model computes between two exchanges, roughly: long enough for ranks that
wait to go to sleep."""
VARIANTS = ("pass-kv", "gather-kv", "pass-q", "pass-q-all2all", "gather-q")


@torch.inference_mode()
def measure(world: World, dtypes: tuple[str, ...], repeats: int = 7) -> HardwareProfile:
    """The profile of this world's ranks, the same on each; the link's figures need two ranks.

    Rates of dtypes that are not measured keep the default's ratio to the first that is. Collective.
    """
    device, threads = world.device.type, torch.get_num_threads()
    machines = world.size // world.local_size
    at_once = None
    if device == "cpu":
        at_once = max(1, usable_processors(world) // threads)
    counts = _counts(world, at_once)
    worlds = smaller_worlds(world, counts)
    fitting = max(n for n in counts if n <= (at_once or world.cp) or n == counts[0])
    clock = _Clock(world, worlds[fitting], repeats)
    clocks = {fitting: clock}
    if device == "cpu" and world.tp == 1 and fitting > 1:
        clocks = {1: _Clock(world, smaller_worlds(world, [1])[1], repeats), **clocks}
    default = default_profile(device)
    profile = dataclasses.replace(
        default,
        name=f"{MEASURED}{world.size} {device} rank{'s' * (world.size > 1)}",
        position_s=_positions(clock),
        op_overhead_s=_small_op(clock),
        touch_bandwidth=_touch(clock),
        ranks_per_host=world.local_size if machines > 1 else None,
        ranks_at_once=at_once,
        notes={},
        peak_flops={},  # of another device, perhaps
    )
    if device == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / at_once
        profile = dataclasses.replace(profile, threads=threads, memory_bytes=memory)
    for done, name in enumerate(dtypes):
        world.report("measure compute", done, len(dtypes))
        profile = _compute(clocks, profile, default, name, first=done == 0)
    if world.cp > 1:
        world.report("measure the link")
        joined = worlds[fitting if fitting > 1 else counts[-1]]
        link, steals = _link(_Clock(world, joined, repeats), joined)
        joins = "network" if machines > 1 else "host_link"
        profile = dataclasses.replace(profile, transfer_steals=steals, **{joins: link})
    profile = _overheads(world, worlds, profile, dtypes[0], OVERHEAD_REPEATS * repeats)
    rule = fit_rule(EXAMPLE, dtypes[0], max(2, world.cp), profile)
    return world.gather(dataclasses.replace(profile, rule=rule))[0]


@torch.inference_mode()
def measure_more_ranks(
    world: World, dtypes: tuple[str, ...], profile: HardwareProfile, repeats: int = 7
) -> HardwareProfile:
    """`profile`, measured on fewer ranks, with what variants cost beyond it on these: where ranks
    take turns they may not be bound to cores, which would spoil the rest. Collective.
    """
    here = profile.for_ranks(torch.get_num_threads(), usable_processors(world))
    more = _overheads(world, {world.cp: world}, here, dtypes[0], OVERHEAD_REPEATS * repeats)
    both = {
        table: {**getattr(profile, table), **getattr(more, table)}
        for table in ("residual_s", "start_s")
    }
    return world.gather(dataclasses.replace(profile, **both))[0]


def _counts(world: World, at_once: int | None) -> list[int]:
    """Numbers of ranks to look at, ascending: two, four, .. and all."""
    powers = [1 << n for n in range(1, world.cp.bit_length()) if 1 << n < world.cp]
    if at_once == 1:
        powers = [1, *powers]
    # TP ranks and processes on other machines are there all the time.
    return sorted({*powers, world.cp}) if world.tp == 1 else [world.cp]


class _Clock:
    """Times work that the ranks of `part` do at the same time while the rest of `world` waits."""

    def __init__(self, world: World, part: World | None, repeats: int) -> None:
        self.world, self.part, self.repeats = world, part, repeats
        self.device = world.device

    def __call__(self, work: Callable[[], object], calls: int = 1) -> float:
        """Seconds of one call of `work`, run `calls` times in a row."""
        return self.all({"": work}, calls)[""]

    def all(
        self, works: dict[str, Callable[[], object]], calls: int = 1
    ) -> dict[str, float]:
        """Of each of `works`, in turn, so that a drift of the machine meets all alike."""
        spent: dict[str, list[float]] = {name: [] for name in works}
        for repeat in range(self.repeats + 1):
            for name, work in works.items():
                self.world.barrier()
                if self.part is None:
                    continue
                began = time.perf_counter()
                for _ in range(calls):
                    work()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat:  # the first one warms up
                    spent[name].append((time.perf_counter() - began) / calls)
        middle = {
            name: statistics.median(times) if times else 0.0
            for name, times in spent.items()
        }
        return {name: max(found[name] for found in self.world.gather(middle)) for name in works}


def _slope(low: tuple[float, float], high: tuple[float, float]) -> float:
    """Units a second from (units, seconds) of a small and a large run: constant costs cancel."""
    seconds = max(high[1] - low[1], 0.05 * high[1])
    return (high[0] - low[0]) / seconds


def _compute(
    clocks: dict[int, _Clock], profile: HardwareProfile, default: HardwareProfile, name: str,
    first: bool,
) -> HardwareProfile:  # fmt: skip
    """`profile` with what linear layers and attention reach in a dtype.

    clocks: by the number of ranks that compute, ascending; the rates are those of the most. The
    first dtype says what memory gives, and scales those that are not measured.
    """
    dtype, clock = getattr(torch, name), clocks[max(clocks)]
    if first:
        tiny = clock(_layer(clock.device, TINY, dtype)(1), calls=16)
        profile = dataclasses.replace(profile, layer_overhead_s=tiny)
    row_rates = {name: ()}
    if clock.device.type == "cpu":
        found = [_row_rates(clock, ranks, name) for ranks, clock in clocks.items()]
        row_rates[name] = tuple(rates for rates, _ in found)
        rate, weights = found[-1][0].flops_of_many, found[-1][1]
    else:
        rate, weights = _device_rates(clock, name, profile.layer_overhead_s)
    pairs, reading = _attention(clock, dtype)
    linear, attention = dict(profile.linear_flops), dict(profile.attention_flops)
    if first:
        profile = dataclasses.replace(profile, memory_bandwidth=weights, **reading)
        scales = rate / default.linear_flops[name], pairs / default.attention_flops[name]
        linear = {other: scales[0] * value for other, value in linear.items()}
        attention = {other: scales[1] * value for other, value in attention.items()}
    linear[name], attention[name] = rate, pairs
    return dataclasses.replace(
        profile, linear_flops=linear, attention_flops=attention,
        row_rates={**profile.row_rates, **row_rates},
    )  # fmt: skip


def _row_rates(clock: _Clock, ranks: int, name: str) -> tuple[RowRates, float]:
    """What linear layers reach by rows while `ranks` ranks compute, and B/s of reading weights.

    From two layers of different widths: what both take alike is no width's.
    """
    dtype = getattr(torch, name)
    edge = min(tokenwise.FEW_ROWS[dtype], ROWS // 16)  # beyond it another kernel computes
    rows = sorted({1 << n for n in range(MOST_ROWS.bit_length())} | {edge, edge + 1})
    # Some calls in a row, as in a model: the first one wakes the core up.
    calls = {count: max(1, min(16, 128 // count)) for count in rows}
    works = {}
    for config in (HALF, EXAMPLE):
        layer = _layer(clock.device, config, dtype)
        for count in rows:
            works[f"{config.hidden_size} {count}"] = layer(count, calls[count])
    times = clock.all(works)
    forwards = [Forward(config, name, 1, 0, 1, 1) for config in (HALF, EXAMPLE)]
    sizes = [sum(count for count, _ in forward.linear_layers()) for forward in forwards]
    spent = [
        [
            times[f"{forward.config.hidden_size} {count}"] / calls[count]
            for count in rows
        ]
        for forward in forwards
    ]
    read = max(spent[1][0] - spent[0][0], 0.05 * spent[1][0])
    weights = (sizes[1] - sizes[0]) * ELEMENT_BYTES[name] / read
    products = [
        [took - count * elementwise_bytes(forward) / weights for count, took in zip(rows, taken)]
        for forward, taken in zip(forwards, spent)
    ]
    return fitted(ranks, rows, *zip(sizes, products)), weights


def _device_rates(clock: _Clock, name: str, overhead: float) -> tuple[float, float]:
    """FLOP/s of products of many rows, and B/s of reading weights, where one kernel serves all."""
    few = 12
    layer = _layer(clock.device, EXAMPLE, getattr(torch, name))
    one, some, many = (clock(layer(rows), calls=max(1, 4 // rows)) for rows in (1, few, ROWS))
    forward = Forward(EXAMPLE, name, 1, 0, 1, 1)
    parameters = sum(count for count, _ in forward.linear_layers())
    weights = parameters * ELEMENT_BYTES[name] / max(one - overhead, 0.05 * one)
    small = elementwise_bytes(forward) / weights
    flops = 2 * parameters * (ROWS - few)
    return flops / max(many - some - small * (ROWS - few), 0.05 * many), weights


def _layer(
    device: torch.device, config: LlamaConfig, dtype: torch.dtype
) -> Callable[..., Callable[[], None]]:
    """Work of a number of rows, and of calls in a row, on a layer as the model has it, without
    attention, its weights not in any cache.
    """

    def made() -> DecoderLayer:
        layer = DecoderLayer(config, 0, 1, device).to(dtype)
        for parameter in layer.parameters():
            parameter.fill_(0.02)
        return layer

    layers = [made()]
    weights = sum(parameter.nbytes for parameter in layers[0].parameters())
    if config is not TINY:
        layers += [made() for _ in range(COLD_BYTES // weights)]
    following = cycle(layers)

    def of(rows: int, calls: int = 1) -> Callable[[], None]:
        hidden = torch.randn(rows, config.hidden_size, device=device).to(dtype)
        angles = torch.ones(rows, 1, config.head_dim // 2, device=device)

        def work() -> None:
            for _ in range(calls):
                next(following)(hidden, angles, angles, lambda _, q, k, v: q)

        return work

    return of


def _attention(clock: _Clock, dtype: torch.dtype) -> tuple[float, dict[str, float]]:
    """FLOP/s of visible pairs, and the fields of the profile that tell of reading keys and of what
    a call costs.
    """
    few_rows = cpu_stream_rows(dtype, EXAMPLE.head_dim) if clock.device.type == "cpu" else 0
    heads, kv_heads, dim = (
        EXAMPLE.num_attention_heads, EXAMPLE.num_key_value_heads, EXAMPLE.head_dim,
    )  # fmt: skip

    def call(queries: int, keys: int, first: int) -> Callable[[], object]:
        q = torch.randn(queries, heads, dim, device=clock.device).to(dtype)
        size = keys, 2, kv_heads, dim
        copies = 1 + COLD_BYTES // (math.prod(size) * dtype.itemsize) if queries < ROWS else 1
        blocks = [large_pages.empty(size, dtype, clock.device).normal_() for _ in range(copies)]
        q_pos, k_pos = (
            torch.arange(start, start + count, dtype=torch.int32, device=clock.device)
            for start, count in ((first, queries), (0, keys))
        )
        cu_q, cu_k = (
            torch.tensor([0, count], dtype=torch.int32, device=clock.device)
            for count in (queries, keys)
        )
        rest = (q_pos, k_pos, cu_q, cu_k, dim**-0.5)
        following = cycle(blocks)

        def attend() -> None:
            kv = next(following)
            attention_partial(q, kv[:, 0], kv[:, 1], *rest)

        return attend

    few_queries = max(1, few_rows * kv_heads // heads)
    empty = clock(call(1, 1, 1), calls=32)
    few = clock.all(
        {"one": call(1, 8192, 8192), "several": call(few_queries, 8192, 8192)}, calls=4
    )
    times = clock.all(
        {
            "dense": call(ROWS, 2048, 2048),
            "causal": call(ROWS, ROWS, 0),
            "block": call(BLOCK, 8192, 8192),
        },
        calls=2,
    )
    pair = 4 * heads * dim
    width = 2 * kv_heads * dim * ELEMENT_BYTES[str(dtype).removeprefix("torch.")]
    rate = _slope((0, empty), (pair * ROWS * 2048, times["dense"]))
    cut = (times["causal"] - empty) * rate / pair / ROWS - (ROWS + 1) / 2
    one, packing = (
        width * 8192 / max(spent - empty - pair * queries * 8192 / rate, 0.05 * spent)
        for queries, spent in ((1, few["one"]), (BLOCK, times["block"]))
    )
    reading, share = one, 1.0
    if few_rows:  # which are read and computed at the same time
        alone, several = (max(spent - empty, 0.05 * spent) for spent in few.values())
        reading = width * 8192 / alone
        share = pair * few_queries * 8192 / rate / several
    return rate, {
        "cache_bandwidth": reading,
        "few_query_rows": few_rows,
        "few_query_rate": share,
        "block_bandwidth": min(one, packing),
        "call_overhead_s": empty,
        "attention_ramp": min(max(0.0, cut), ROWS / 2),
    }


def _small_op(clock: _Clock) -> float:
    """Seconds of copying a few bytes."""
    few = torch.zeros(64, device=clock.device)
    return clock(few.clone, calls=64)


def _touch(clock: _Clock) -> float:
    """B/s of bringing rows of a message's size into another order, again and again."""
    rows, width = 4096, 256
    given = torch.zeros(rows, width, device=clock.device)
    order = torch.arange(rows, device=clock.device).view(8, -1).T.flatten()
    made = torch.empty_like(given)
    return 2 * given.nbytes / clock(lambda: torch.index_select(given, 0, order, out=made), calls=4)


def _positions(clock: _Clock) -> float:
    """Seconds a key of putting the positions that four ranks hold in order."""
    tokens = 16384
    placements = balanced([tokens], 4).placements()
    placements = [placement.to(clock.device) for placement in placements]
    return clock(lambda: union(placements)) / tokens


def _link(clock: _Clock, part: World | None) -> tuple[Link, float]:
    """The link, and of a transfer's time the part that compute loses to it."""
    device, ring = clock.device, ring_of(part) if part else Ring()
    ahead, behind = (ring.rank - 1) % ring.size, (ring.rank + 1) % ring.size

    def buffers(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        empty = torch.zeros(size, dtype=torch.uint8, device=device)
        return empty, torch.empty_like(empty)

    def transfer(outgoing: torch.Tensor, incoming: torch.Tensor, messages: int = 1) -> None:
        pending = []
        for _ in range(messages):
            pending += ring.send_receive(ahead, outgoing, behind, incoming)
        ring.wait(pending)

    small, large = buffers(SMALL_MESSAGE), buffers(LARGE_MESSAGE)
    latency = clock(lambda: transfer(*small), calls=32)
    several = clock(lambda: transfer(*small, messages=5), calls=8)
    whole = clock(lambda: transfer(*large), calls=4)

    # Compute that takes somewhat longer than the transfer, alone and with it.
    x = torch.randn(1024, 1024, device=device)
    unit = clock(lambda: torch.mm(x, x))
    count = max(1, round(2 * whole / unit))

    def compute() -> None:
        for _ in range(count):
            torch.mm(x, x)

    def both() -> None:
        pending = ring.send_receive(ahead, large[0], behind, large[1])
        compute()
        ring.wait(pending)

    times = clock.all({"alone": compute, "together": both})
    bandwidth = _slope((SMALL_MESSAGE, latency), (LARGE_MESSAGE, whole))
    further = max(0.0, several - latency) / 4
    link = Link(bandwidth, bandwidth, latency, further, latency + (ring.size - 2) * further)
    return link, min(1.0, max(0.0, (times["together"] - times["alone"]) / whole))


def _overheads(
    world: World, worlds: dict[int, World | None], profile: HardwareProfile, dtype: str,
    repeats: int,
) -> HardwareProfile:  # fmt: skip
    """`profile` with what a forward costs once, and what it and the layers of each variant cost
    beyond what the rest of the profile says, where they have next to nothing to compute.

    A whole engine runs a tiny model of few and of more layers: the difference is the layers', the
    rest the forward's. On a CPU its layers pause as if they computed, because ranks that sleep
    answer later than those that have just begun to wait.
    """
    pause = PAUSE_S if world.device.type == "cpu" else 0.0
    once: dict[int, dict[str, tuple[float, float]]] = {}
    residual: dict[str, dict[str, tuple[float, float]]] = {}
    # Without `row_rates`: they tell of layers whose products take time.
    here = dataclasses.replace(profile, residual_s={}, start_s={}, row_rates={})
    world.report("measure the overheads")
    for count, part in worlds.items():
        clock = _Clock(world, part, repeats)
        works: dict[str, Callable[[], object]] = {}
        for layers in (FEW_LAYERS, MORE_LAYERS):
            config = dataclasses.replace(TINY, num_hidden_layers=layers)
            engine = placements = None
            if part is not None:
                model = random_model(config, getattr(torch, dtype), part)
                for layer in model.layers if pause else ():
                    layer.register_forward_pre_hook(_pause)
                engine = Engine(model, part, profile=here)
                placements = hold(engine, HELD)
            for variant in VARIANTS if count > 1 else VARIANTS[:1]:
                for new in (1, 2 * count):
                    works[f"{variant} {new} {layers}"] = _forward(
                        engine, placements, variant, new
                    )
        times = clock.all(works)
        found, started = {}, {}
        for variant in VARIANTS if count > 1 else VARIANTS[:1]:
            layer, start = [], []
            for new in (1, 2 * count):
                few = times[f"{variant} {new} {FEW_LAYERS}"]
                more = times[f"{variant} {new} {MORE_LAYERS}"]
                each = max(0.0, more - few) / (MORE_LAYERS - FEW_LAYERS)
                forward = Forward(TINY, dtype, new, HELD, count, count)
                paused = pause * max(1.0, forward.sources / (profile.ranks_at_once or count))
                layer.append(each - paused - predict(variant, forward, here).seconds)
                start.append(max(0.0, few - FEW_LAYERS * each))
            found[variant], started[variant] = tuple(layer), tuple(start)
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
        forward = statistics.median(undisturbed)
        profile = dataclasses.replace(profile, forward_overhead_s=forward)
    usual = profile.forward_overhead_s
    starts = {
        str(count): {variant: (a - usual, b - usual) for variant, (a, b) in started.items()}
        for count, started in once.items()
        if count > 1
    }
    return dataclasses.replace(profile, residual_s=residual, start_s=starts)


def _pause(_: DecoderLayer, inputs: tuple) -> None:
    """Keeps the core of a rank that has tokens busy."""
    end = time.perf_counter() + (PAUSE_S if inputs[0].shape[0] else 0.0)
    while time.perf_counter() < end:
        pass


def _forward(
    engine: Engine | None, placements: tuple[Placement, ...] | None, variant: str, new: int
) -> Callable[[], object]:
    def work() -> None:
        rewind(engine, HELD, placements)
        engine.variant = variant
        engine.extend([[1] * (new - 1)])
        engine.next_tokens(Sampling())

    return work
