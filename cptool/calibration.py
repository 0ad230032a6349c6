"""Measures a hardware profile on the ranks as they were launched.

All ranks measure at the same time, because that is how they work: what cores, memory or links
share, they share here too. Each time is the median of some repetitions on the slowest rank.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from cptool.cost import ELEMENT_BYTES
from cptool.distributed import World
from cptool.hardware import MEASURED, HardwareProfile, Link, default_profile, usable_processors
from cptool.model.config import LlamaConfig
from cptool.ops import attention_partial
from cptool.ring import Ring
from cptool.staged import ring_of
from cptool.sharding import balanced, union
from cptool.strategy import fit_rule

HIDDEN, WIDTH = 1024, 4096
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 128
ROWS = 1024
SMALL_MESSAGE, LARGE_MESSAGE = 1 << 10, 4 << 20

# A GQA model of common proportions, on which the rule's coefficients are fitted.
EXAMPLE = LlamaConfig(
    vocab_size=32000,
    hidden_size=HIDDEN,
    intermediate_size=WIDTH,
    num_hidden_layers=8,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)


@torch.inference_mode()
def measure(world: World, dtypes: tuple[str, ...], repeats: int = 7) -> HardwareProfile:
    """The profile of this world's ranks, the same on each; the link's figures need two ranks.

    Rates of dtypes that are not measured keep the default's ratio to the first that is.
    """
    clock = _Clock(world, repeats)
    device = world.device.type
    default = default_profile(device)
    linear, attention = dict(default.linear_flops), dict(default.attention_flops)
    first = dtypes[0]
    for done, name in enumerate(dtypes):
        world.report("measure compute", done, len(dtypes))
        rate, weights = _linear(clock, getattr(torch, name))
        pairs, cache, call = _attention(clock, getattr(torch, name))
        if name == first:
            memory_bandwidth, cache_bandwidth, call_overhead = weights, cache, call
            scales = rate / linear[name], pairs / attention[name]
            linear = {other: scales[0] * value for other, value in linear.items()}
            attention = {other: scales[1] * value for other, value in attention.items()}
        linear[name], attention[name] = rate, pairs
    profile = dataclasses.replace(
        default,
        name=f"{MEASURED}{world.size} {device} rank{'s' * (world.size > 1)}",
        ranks_per_host=world.local_size if world.size > world.local_size else None,
        notes={},
        peak_flops={},  # of another device, perhaps
        linear_flops=linear,
        attention_flops=attention,
        memory_bandwidth=memory_bandwidth,
        cache_bandwidth=cache_bandwidth,
        call_overhead_s=call_overhead,
        op_overhead_s=_small_op(clock),
        layer_overhead_s=_small_layer(clock, getattr(torch, first)),
        position_s=_positions(clock),
    )
    if device == "cpu":
        machines = world.size // world.local_size
        threads = torch.get_num_threads()
        at_once = max(1, machines * usable_processors() // threads)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / at_once
        profile = dataclasses.replace(
            profile, threads=threads, ranks_at_once=at_once, memory_bytes=memory
        )
    if world.cp > 1:
        world.report("measure the link")
        link, steals = _link(clock, ring_of(world))
        joins = "network" if world.size > world.local_size else "host_link"
        profile = dataclasses.replace(profile, transfer_steals=steals, **{joins: link})
    rule = fit_rule(EXAMPLE, first, max(2, world.cp), profile)
    return world.gather(dataclasses.replace(profile, rule=rule))[0]


class _Clock:
    def __init__(self, world: World, repeats: int) -> None:
        self.world, self.repeats = world, repeats

    def __call__(self, work: Callable[[], object], calls: int = 1) -> float:
        """Seconds of one call of `work`, run `calls` times in a row."""
        spent = []
        for repeat in range(self.repeats + 1):
            self.world.barrier()
            began = time.perf_counter()
            for _ in range(calls):
                work()
            if self.world.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first one warms up
                spent.append((time.perf_counter() - began) / calls)
        return max(self.world.gather(statistics.median(spent)))


def _slope(low: tuple[float, float], high: tuple[float, float]) -> float:
    """Units a second from (units, seconds) of a small and a large run: constant costs cancel."""
    seconds = max(high[1] - low[1], 0.05 * high[1])
    return (high[0] - low[0]) / seconds


def _linear(clock: _Clock, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of many rows, and B/s at which the weights of a single row's product are read."""
    device = clock.world.device
    weight = torch.randn(WIDTH, HIDDEN, device=device).to(dtype)
    times = {}
    for rows in (1, ROWS):
        x = torch.randn(rows, HIDDEN, device=device).to(dtype)
        times[rows] = clock(lambda x=x: functional.linear(x, weight), calls=8 if rows == 1 else 1)
    flops = 2 * WIDTH * HIDDEN
    return _slope((flops, times[1]), (flops * ROWS, times[ROWS])), weight.nbytes / times[1]


def _attention(clock: _Clock, dtype: torch.dtype) -> tuple[float, float, float]:
    """FLOP/s of visible pairs, B/s of keys and values read, and seconds of a call with no work."""
    device = clock.world.device

    def seconds(queries: int, keys: int, calls: int = 1) -> float:
        q = torch.randn(queries, HEADS, HEAD_DIM, device=device).to(dtype)
        kv = torch.randn(keys, 2, KV_HEADS, HEAD_DIM, device=device).to(dtype)
        q_pos = torch.arange(keys, keys + queries, dtype=torch.int32, device=device)
        k_pos = torch.arange(keys, dtype=torch.int32, device=device)
        cu_q = torch.tensor([0, queries], dtype=torch.int32, device=device)
        cu_k = torch.tensor([0, keys], dtype=torch.int32, device=device)
        arguments = (q, kv[:, 0], kv[:, 1], q_pos, k_pos, cu_q, cu_k, HEAD_DIM**-0.5)
        return clock(lambda: attention_partial(*arguments), calls)

    call = seconds(1, 1, calls=32)
    few, many, keys = seconds(1, 8 * ROWS, calls=4), seconds(ROWS, 2 * ROWS), 8 * ROWS
    pair = 4 * HEADS * HEAD_DIM
    width = 2 * KV_HEADS * HEAD_DIM * ELEMENT_BYTES[str(dtype).removeprefix("torch.")]
    rate = _slope((0, call), (pair * ROWS * 2 * ROWS, many))
    reading = max(few - call - pair * keys / rate, 0.05 * few)
    return rate, width * keys / reading, call


def _small_op(clock: _Clock) -> float:
    """Seconds of copying a few bytes."""
    few = torch.zeros(64, device=clock.world.device)
    return clock(few.clone, calls=64)


def _small_layer(clock: _Clock, dtype: torch.dtype) -> float:
    """Seconds of what surrounds the large products in a layer, for one token."""
    from cptool.model.llama import DecoderLayer

    device = clock.world.device
    tiny = dataclasses.replace(
        EXAMPLE, hidden_size=64, intermediate_size=64, num_attention_heads=1,
        num_key_value_heads=1, head_dim=64,
    )  # fmt: skip
    layer = DecoderLayer(tiny, 0, 1, device).to(dtype)
    for parameter in layer.parameters():
        parameter.fill_(0.01)
    hidden = torch.randn(1, 64, device=device).to(dtype)
    angles = torch.ones(1, 1, 32, device=device)
    return clock(lambda: layer(hidden, angles, angles, lambda _, q, k, v: q), calls=16)


def _positions(clock: _Clock) -> float:
    """Seconds a key of putting the positions that four ranks hold in order."""
    tokens = 16 * ROWS
    placements = balanced([tokens], 4).placements()
    placements = [placement.to(clock.world.device) for placement in placements]
    return clock(lambda: union(placements)) / tokens


def _link(clock: _Clock, ring: Ring) -> tuple[Link, float]:
    """The link, and of a transfer's time the part that compute loses to it."""
    device = clock.world.device
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
    x = torch.randn(HIDDEN, HIDDEN, device=device)
    unit = clock(lambda: torch.mm(x, x))
    count = max(1, round(2 * whole / unit))

    def compute() -> None:
        for _ in range(count):
            torch.mm(x, x)

    def both() -> None:
        pending = ring.send_receive(ahead, large[0], behind, large[1])
        compute()
        ring.wait(pending)

    alone = clock(compute)
    together = clock(both)
    bandwidth = _slope((SMALL_MESSAGE, latency), (LARGE_MESSAGE, whole))
    further = max(0.0, several - latency) / 4
    link = Link(bandwidth, bandwidth, latency, further, latency + (ring.size - 2) * further)
    return link, min(1.0, max(0.0, (together - alone) / whole))
