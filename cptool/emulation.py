"""One rank of one layer of a prefill, run alone on one device: the projection of a whole run.

The layer is the model's own, at its tensor-parallel width, with random weights; its attention is
the variant's own code over blocks of the exact sizes and positions of every source. What other
ranks would send takes its time from a hardware profile (`cptool.emulated_ring`). So one device
tells what N x M of them would take, and which part of that was measured.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from cptool import emulated_memory
from cptool.attention import KEYS_TRAVEL, Step, attend
from cptool.cache import KVCache
from cptool.cost import Forward, all_reduce, attention_flops, linear_flops, prefill
from cptool.emulated_ring import Compute, EmulatedRing, Timeline, Trace, Wait, replay
from cptool.hardware import HardwareProfile
from cptool.model.config import LlamaConfig
from cptool.model.fp8 import RowwiseFp8
from cptool.model.llama import DecoderLayer
from cptool.model.rope import inverse_frequencies, rotary_tables
from cptool.sharding import Placement, balanced, concat
from cptool.strategy import Choice, choose

LINEAR = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
REDUCED = ("o_proj", "down_proj")
OTHER = "norms, rotation, cache, activation"


@dataclass(frozen=True)
class Scenario:
    """`new` tokens over `cached` ones on `cp` x `tp` ranks, one sequence.

    fp8: the feed-forward layers as row-wise scaled FP8 products.
    """

    config: LlamaConfig
    cp: int
    tp: int
    new: int
    cached: int
    variant: str
    dtype: torch.dtype
    device: torch.device
    fp8: bool = False

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads // self.tp

    @property
    def kv_heads(self) -> int:
        return max(1, self.config.num_key_value_heads // self.tp)

    @property
    def ffn(self) -> int:
        return self.config.intermediate_size // self.tp


@dataclass(frozen=True)
class Shards:
    """What every CP rank holds: cached tokens, the new ones (its queries), both (its keys)."""

    cached: tuple[Placement, ...]
    queries: tuple[Placement, ...]
    keys: tuple[Placement, ...]

    def to(self, device: torch.device) -> Shards:
        sides = (self.cached, self.queries, self.keys)
        return Shards(*(tuple(p.to(device) for p in side) for side in sides))

    @property
    def busiest(self) -> int:
        """The rank whose queries see the most keys: position p sees p + 1."""
        visible = [int((p.positions.long() + 1).sum()) for p in self.queries]
        return visible.index(max(visible))

    def pairs(self, asking: int, holding: int) -> int:
        """Visible pairs of one rank's queries and another's keys."""
        queries, keys = self.queries[asking].positions, self.keys[holding].positions
        return int(torch.searchsorted(keys, queries, right=True).sum())


@dataclass(frozen=True)
class Part:
    """Time of one part of a layer over the repeats, and its `flops`, 0 where bytes count."""

    name: str
    seconds: float
    fastest_s: float
    slowest_s: float
    flops: float


@dataclass(frozen=True)
class Segment:
    """Attention between two transfers; source None: of no single source. The last one merges."""

    source: int | None
    pairs: int
    seconds: float


@dataclass(frozen=True)
class Projection:
    """What was measured of rank `rank`, and what follows for the whole model.

    parts, segments: of one layer, measured. transfer_s: of its transfers, of which exposed_s is not
    hidden; waiting_s: of ranks for each other; allreduce_s: of its tensor-parallel sums; all from
    the profile. once: what a forward does once, measured but for its overhead, the profile's.
    flops: of the whole model, a causal pair counted once. planned_s: what the cost model predicts
    on the profile's own devices.
    """

    rank: int
    queries: int
    keys: int
    variant: str
    reason: str
    parts: tuple[Part, ...]
    segments: tuple[Segment, ...]
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
    emulated_bytes: int

    @property
    def compute_s(self) -> float:
        """Of a layer."""
        return sum(part.seconds for part in self.parts)

    @property
    def layer_s(self) -> float:
        return self.compute_s + self.exposed_s + self.waiting_s + self.allreduce_s

    @property
    def ttft_s(self) -> float:
        """Of the whole model."""
        return self.layers * self.layer_s + sum(self.once.values())

    @property
    def flops_per_rank(self) -> float:
        """FLOP/s of a rank over the whole forward."""
        return self.flops / self.ttft_s / self.ranks


def shards(scenario: Scenario, active: int) -> Shards:
    """New tokens in balance over a cache that is in balance."""
    cached = balanced([scenario.cached], scenario.cp).placements()
    held = [[placement.tokens] for placement in cached]
    layout = balanced([scenario.new], scenario.cp, [scenario.cached], held, active)
    queries = layout.placements()
    return Shards(cached, queries, tuple(concat(*pair) for pair in zip(cached, queries)))


@torch.inference_mode()
def emulate(
    scenario: Scenario,
    profile: HardwareProfile,
    repeats: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Projection:
    """Runs the layer once to warm up and then `repeats` times, and projects the medians.

    Raises UserError, one line, where the device has too little memory for it.
    """
    config, device = scenario.config, scenario.device
    choice = choose(
        scenario.variant, new=scenario.new, cached=scenario.cached, ranks=scenario.cp,
        config=config, dtype=str(scenario.dtype).removeprefix("torch."), profile=profile,
        tp=scenario.tp,
    )  # fmt: skip
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        held = shards(scenario, choice.active).to(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        dealt = time.perf_counter() - began
    needed = emulated_memory.check(scenario, choice.variant, held)

    rank = held.busiest
    layer, passes = _layer(scenario), []
    for done in range(repeats + 1):
        progress(done, repeats + 1)
        passes.append(_run(scenario, layer, choice.variant, held, rank))
    del layer
    traces = [trace for trace, _, _ in passes[1:]]
    _, reduced, sent = passes[-1]
    trace = _median(traces)
    transfers = [entry for entry in trace if not isinstance(entry, Compute)]
    link, over = profile.link(scenario.cp * scenario.tp), range(scenario.cp)
    if choice.variant in KEYS_TRAVEL or scenario.cp == 1:
        pairs = [held.pairs(rank, source) for source in over]
    else:
        pairs = [held.pairs(source, rank) for source in over]
    return Projection(
        rank=rank,
        queries=held.queries[rank].tokens,
        keys=held.keys[rank].tokens,
        variant=choice.variant,
        reason=choice.reason,
        parts=_parts(scenario, traces, held.queries[rank].tokens, sum(pairs)),
        segments=_segments(trace, choice.variant, rank, pairs),
        sent_bytes=sent,
        transfer_s=replay(transfers, link),
        exposed_s=replay(trace, link, profile.transfer_steals),
        waiting_s=_waiting(scenario, choice.variant, profile),
        allreduce_bytes=sum(reduced),
        allreduce_s=sum(all_reduce(count, scenario.tp, profile)[0] for count in reduced),
        once={
            "overhead": profile.forward_overhead_s,
            "positions and shards": dealt,
            **_once(scenario, held.queries[rank]),
        },
        layers=config.num_hidden_layers,
        flops=linear_flops(config, scenario.new, 1)
        + attention_flops(config, scenario.new, scenario.cached),
        ranks=scenario.cp * scenario.tp,
        planned_s=_planned(scenario, choice, profile),
        emulated_bytes=needed,
    )


def _planned(scenario: Scenario, choice: Choice, profile: HardwareProfile) -> float:
    """TTFT by `cptool.cost`."""
    forward = Forward(
        scenario.config, str(scenario.dtype).removeprefix("torch."), scenario.new, scenario.cached,
        scenario.cp, choice.active, tp=scenario.tp,
        feed_forward="float8" if scenario.fp8 else None,
    )  # fmt: skip
    return prefill(choice.variant, forward, profile).seconds


def _waiting(scenario: Scenario, variant: str, profile: HardwareProfile) -> float:
    """What ranks that do not keep pace cost in a layer: each of them, and each exchange."""
    if scenario.cp == 1:
        return 0.0
    exchanges = {"gather-kv": 1, "gather-q": 2, "pass-q-all2all": 1}.get(variant, 0)
    return scenario.cp * profile.wait_s + exchanges * profile.skew_s


def _layer(scenario: Scenario) -> DecoderLayer:
    """The model's layer with random weights in place of those of "meta"."""
    layer = DecoderLayer(scenario.config, 0, scenario.tp, "meta").requires_grad_(False)
    weights = {}
    for name, parameter in layer.named_parameters():
        values = torch.empty(parameter.shape, dtype=scenario.dtype, device=scenario.device)
        weights[name] = values.fill_(1.0) if values.dim() == 1 else values.normal_(std=0.02)
    layer.load_state_dict(weights, assign=True)
    if scenario.fp8:
        layer.mlp.gate_up_proj = RowwiseFp8(layer.mlp.gate_up_proj.weight)
        layer.mlp.down_proj = RowwiseFp8(layer.mlp.down_proj.weight)
    return layer.eval()


def _run(
    scenario: Scenario, layer: DecoderLayer, variant: str, held: Shards, rank: int
) -> tuple[Trace, list[int], int]:
    """One pass: its trace, the bytes of each all-reduce, the bytes sent."""
    config, device, dtype = scenario.config, scenario.device, scenario.dtype
    timeline, reduced = Timeline(device), []
    ring = EmulatedRing(rank, scenario.cp, timeline)
    step = Step(rank, held.queries, held.keys if variant in KEYS_TRAVEL else ())
    mine = held.queries[rank]
    cache = KVCache(
        layers=1, kv_heads=scenario.kv_heads, head_dim=config.head_dim, batch=1, dtype=dtype,
        device=device,
    )  # fmt: skip
    cache.reserve([held.keys[rank].tokens])
    cache.extend(held.cached[rank])
    cache.tokens_from(0, 0, 0).normal_()
    cache.extend(mine)
    hidden = torch.randn(mine.tokens, config.hidden_size, dtype=dtype, device=device)
    tables = rotary_tables(mine.positions, inverse_frequencies(config).to(device))

    def attention(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cache.store(0, k, v)
        timeline.mark("attention")
        out = attend(variant, q, cache.layer(0), step, ring, config.head_dim**-0.5)
        timeline.mark(OTHER)
        return out

    def watch(name: str, module: torch.nn.Module) -> list:
        def after(_, __, output: torch.Tensor) -> None:
            timeline.mark(OTHER)
            if scenario.tp > 1 and name in REDUCED:
                reduced.append(output.nbytes)

        before = module.register_forward_pre_hook(lambda *_: timeline.mark(name))
        return [before, module.register_forward_hook(after)]

    modules = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    hooks = [hook for name in LINEAR for hook in watch(name, modules[name])]
    timeline.mark(OTHER)
    layer(hidden, *tables, attention)
    timeline.mark(OTHER)
    for hook in hooks:
        hook.remove()
    return timeline.trace(), reduced, ring.sent_bytes


def _once(scenario: Scenario, mine: Placement) -> dict[str, float]:
    """Seconds of the embedding, of the rotary tables and of the logits of one row."""
    config, device = scenario.config, scenario.device
    size = (config.vocab_size, config.hidden_size)
    table = torch.empty(size, dtype=scenario.dtype, device=device).normal_(std=0.02)
    tokens = torch.randint(config.vocab_size, (mine.tokens,), device=device)
    frequencies, row = inverse_frequencies(config).to(device), table[:1].clone()

    def timed(work: Callable[[], object]) -> float:
        spent = []
        for _ in range(4):
            timeline = Timeline(device)
            timeline.mark("work")
            work()
            timeline.mark("end")
            spent.append(timeline.trace()[0].seconds)
        return statistics.median(spent[1:])

    return {
        "embedding": timed(lambda: functional.embedding(tokens, table)),
        "rotary tables": timed(lambda: rotary_tables(mine.positions, frequencies)),
        "logits of the last token": timed(lambda: functional.linear(row, table)),
    }


def _median(traces: list[Trace]) -> Trace:
    """The entries of a pass with the median of each compute."""
    return [
        dataclasses.replace(same[0], seconds=statistics.median(entry.seconds for entry in same))
        if isinstance(same[0], Compute)
        else same[0]
        for same in zip(*traces, strict=True)
    ]


def _parts(
    scenario: Scenario, traces: list[Trace], tokens: int, pairs: int
) -> tuple[Part, ...]:
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
        parts.append(Part(name, statistics.median(spent), min(spent), max(spent), count))
    return tuple(parts)


def _segments(trace: Trace, variant: str, rank: int, pairs: list[int]) -> tuple[Segment, ...]:
    """Attention as waits cut it: in a ring, one segment a source."""
    spent, current = [], 0.0
    for entry in trace:
        if isinstance(entry, Wait):
            spent.append(current)
            current = 0.0
        elif isinstance(entry, Compute) and entry.label == "attention":
            current += entry.seconds
    spent.append(current)
    size = len(pairs)
    if size > 1 and variant.startswith("gather"):
        return (Segment(None, sum(pairs), sum(spent)),)
    ring = [Segment((rank + i) % size, pairs[(rank + i) % size], spent[i]) for i in range(size)]
    rest = sum(spent[size:])
    return (*ring, Segment(None, 0, rest)) if len(spent) > size else tuple(ring)
