"""One rank of one layer of a prefill, run alone on one device: the projection of a whole run.

The layer (`cptool.emulation.layer`) is measured; messages from other ranks take the time that a
hardware profile gives them (`cptool.emulation.ring`). So one device predicts the time of N x M
ranks, and the result states which part of it was measured.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cptool.emulation import memory
from cptool.emulation.layer import OTHER, Scenario, build, run_once, shards, time_once
from cptool.emulation.ring import Compute, Trace, Wait, replay
from cptool.errors import UserError
from cptool.planning.cost.counts import attention_flops, layers_by_window, linear_flops
from cptool.planning.cost.estimate import prefill
from cptool.planning.cost.exchange import waiting
from cptool.planning.cost.forward import Forward
from cptool.planning.cost.memory import memory_per_rank
from cptool.planning.cost.rates import all_reduce
from cptool.planning.hardware import HardwareProfile
from cptool.planning.strategy import choose
from cptool.variants import find


@dataclass(frozen=True, kw_only=True)
class Part:
    """Time of one part of a layer over the repeats, and its `flops`; 0 if it is bound by memory."""

    name: str
    seconds: float
    fastest_s: float
    slowest_s: float
    flops: float


@dataclass(frozen=True)
class AttentionBlock:
    """Attention between two waits: `pairs` visible pairs in `seconds`.

    source: the rank whose block it is, None if it is of no single rank. The last block merges.
    """

    source: int | None
    pairs: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Projection:
    """What was measured on rank `rank`, and what follows for the whole model.

    parts, blocks: of one layer, measured. The profile gives the rest of a layer, in seconds:
    transfer_s of its transfers, of which exposed_s is not hidden; waiting_s of ranks for each
    other; allreduce_s of its tensor-parallel sums. once: seconds of what a forward does once,
    measured except for the overhead, which is the profile's. flops: of the whole model, each causal
    pair counted once. planned_s: the cost model's prediction for the profile's own devices; memory:
    bytes that the whole model takes on the fullest of them, by use.
    """

    rank: int
    queries: int
    keys: int
    variant: str
    reason: str
    parts: tuple[Part, ...]
    blocks: tuple[AttentionBlock, ...]
    sent_bytes: int
    transfer_s: float
    exposed_s: float
    waiting_s: float
    allreduce_bytes: int
    allreduce_s: float
    once: dict[str, float]
    layers: int
    flops: float
    ranks: int
    planned_s: float
    memory: dict[str, float]
    emulated_bytes: int

    @property
    def compute_s(self) -> float:
        """Seconds of compute per layer."""
        return sum(part.seconds for part in self.parts)

    @property
    def layer_s(self) -> float:
        """Seconds per layer."""
        return self.compute_s + self.exposed_s + self.waiting_s + self.allreduce_s

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token, of the whole model."""
        return self.layers * self.layer_s + sum(self.once.values())

    @property
    def flops_per_rank(self) -> float:
        """FLOP/s per rank over the whole forward."""
        return self.flops / self.ttft_s / self.ranks


@torch.inference_mode()
def emulate(
    scenario: Scenario,
    profile: HardwareProfile,
    repeats: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Projection:
    """Run the layer once to warm up and then `repeats` times, and project the medians.

    Raises UserError, one line, if the device has too little memory for it, or if the layers differ
    in their windows.
    """
    config, device = scenario.config, scenario.device
    if len(layers_by_window(config)) > 1:
        raise UserError(
            "this model's layers have different windows, and one layer is emulated; `cptool plan` "
            "counts them all"
        )
    plain = dataclasses.replace(_forward(scenario, scenario.cp), feed_forward=None)
    choice = choose(scenario.variant, plain, profile)
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        held = shards(scenario, choice.active).to(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        dealt = time.perf_counter() - began
    forward = _forward(scenario, choice.active)
    needed = memory.check(scenario, choice.variant, forward)

    rank = held.busiest
    layer, passes = build(scenario), []
    for done in range(repeats + 1):
        progress(done, repeats + 1)
        passes.append(run_once(scenario, layer, variant=choice.variant, held=held, rank=rank))
    del layer
    traces = [trace for trace, _, _ in passes[1:]]
    _, reduced, sent = passes[-1]
    trace = _median(traces)
    transfers = [entry for entry in trace if not isinstance(entry, Compute)]
    link, over = profile.link(scenario.cp * scenario.tp), range(scenario.cp)
    if find(choice.variant).keys_travel or scenario.cp == 1:
        pairs = [held.pairs(rank, source, config.window(0)) for source in over]
    else:
        pairs = [held.pairs(source, rank, config.window(0)) for source in over]
    return Projection(
        rank=rank,
        queries=held.queries[rank].tokens,
        keys=held.keys[rank].tokens,
        variant=choice.variant,
        reason=choice.reason,
        parts=_parts(scenario, traces, held.queries[rank].tokens, sum(pairs)),
        blocks=_blocks(trace, choice.variant, rank, pairs),
        sent_bytes=sent,
        transfer_s=replay(transfers, link),
        exposed_s=replay(trace, link, profile.transfer_steals),
        waiting_s=_waiting(scenario, choice.variant, profile),
        allreduce_bytes=sum(reduced),
        allreduce_s=sum(all_reduce(count, scenario.tp, profile)[0] for count in reduced),
        once={
            "overhead": profile.forward_overhead_s,
            "positions and shards": dealt,
            **time_once(scenario, held.queries[rank]),
        },
        layers=config.num_hidden_layers,
        flops=linear_flops(config, scenario.new, 1)
        + attention_flops(config, scenario.new, scenario.cached),
        ranks=scenario.cp * scenario.tp,
        planned_s=prefill(choice.variant, forward, profile).seconds,
        memory=memory_per_rank(choice.variant, forward, profile),
        emulated_bytes=needed,
    )


def _forward(scenario: Scenario, active: int) -> Forward:
    """Return the scenario's forward, for the cost model."""
    return Forward(
        config=scenario.config,
        dtype=str(scenario.dtype).removeprefix("torch."),
        new=scenario.new,
        cached=scenario.cached,
        ranks=scenario.cp,
        active=active,
        tp=scenario.tp,
        feed_forward="float8" if scenario.fp8 else None,
        window=scenario.config.window(0),
    )


def _waiting(scenario: Scenario, variant: str, profile: HardwareProfile) -> float:
    """Return the seconds per layer that ranks wait, for each other and for what is cached."""
    skewed = find(variant).collectives * profile.skew_s if scenario.cp > 1 else 0.0
    return waiting(_forward(scenario, scenario.cp), profile) + skewed


def _median(traces: list[Trace]) -> Trace:
    """Return the entries of one pass, with the median of each compute."""
    return [
        dataclasses.replace(same[0], seconds=statistics.median(entry.seconds for entry in same))
        if isinstance(same[0], Compute)
        else same[0]
        for same in zip(*traces, strict=True)
    ]


def _parts(scenario: Scenario, traces: list[Trace], tokens: int, pairs: int) -> tuple[Part, ...]:
    config = scenario.config
    rows, width = 2 * config.hidden_size * tokens, scenario.heads * config.head_dim
    flops = {
        "qkv_proj": rows * (width + 2 * scenario.kv_heads * config.head_dim),
        "attention": 4 * width * pairs,
        "o_proj": rows * width,
        "gate_up_proj": rows * 2 * scenario.ffn,
        "down_proj": rows * scenario.ffn,
        OTHER: 0,
    }
    parts = []
    for name, count in flops.items():
        spent = [
            sum(e.seconds for e in trace if isinstance(e, Compute) and e.label == name)
            for trace in traces
        ]
        parts.append(
            Part(
                name=name,
                seconds=statistics.median(spent),
                fastest_s=min(spent),
                slowest_s=max(spent),
                flops=count,
            )
        )
    return tuple(parts)


def _blocks(trace: Trace, variant: str, rank: int, pairs: list[int]) -> tuple[AttentionBlock, ...]:
    """Return attention as waits divide it: in a ring, one block per source."""
    spent, current = [], 0.0
    for entry in trace:
        if isinstance(entry, Wait):
            spent.append(current)
            current = 0.0
        elif isinstance(entry, Compute) and entry.label == "attention":
            current += entry.seconds
    spent.append(current)
    size = len(pairs)
    if size > 1 and not find(variant).ring:
        return (AttentionBlock(None, sum(pairs), sum(spent)),)
    ring = [
        AttentionBlock((rank + i) % size, pairs[(rank + i) % size], spent[i]) for i in range(size)
    ]
    rest = sum(spent[size:])
    return (*ring, AttentionBlock(None, 0, rest)) if len(spent) > size else tuple(ring)
