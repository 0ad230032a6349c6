"""One rank's part of one layer on one device: the tokens that it holds, and its timed passes.

The layer is the model's own, at its tensor-parallel width, with random weights; its attention is
the variant's own code over blocks of the exact sizes and positions of every source.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from cptool.cache import KVCache
from cptool.emulation.ring import Compute, EmulatedRing, Timeline, Trace
from cptool.model.config import LlamaConfig
from cptool.model.layer import Layer, decoder_layer
from cptool.model.product import Product
from cptool.model.rope import inverse_frequencies, rotary_tables
from cptool.ops.fp8 import Fp8Weight, packed
from cptool.parallel.attention import attend
from cptool.parallel.step import Scores, Step
from cptool.sharding import Placement, balanced, concat
from cptool.variants import find

REDUCED = ("o_proj", "down_proj")
OTHER = "norms, rotation, cache, activation"


@dataclass(frozen=True, kw_only=True)
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
        """Query heads per rank."""
        return self.config.num_attention_heads // self.tp

    @property
    def kv_heads(self) -> int:
        """KV heads per rank; replicated where `tp` exceeds them."""
        return max(1, self.config.num_key_value_heads // self.tp)

    @property
    def ffn(self) -> int:
        """Width of the feed-forward network per rank."""
        return self.config.intermediate_size // self.tp


@dataclass(frozen=True)
class Shards:
    """The tokens of every CP rank: cached ones, new ones (its queries), and both (its keys)."""

    cached: tuple[Placement, ...]
    queries: tuple[Placement, ...]
    keys: tuple[Placement, ...]

    def to(self, device: torch.device) -> Shards:
        """Return the same shards with their tensors on `device`."""
        sides = (self.cached, self.queries, self.keys)
        return Shards(*(tuple(p.to(device) for p in side) for side in sides))

    @property
    def busiest(self) -> int:
        """The rank whose queries see the most keys: position p sees p + 1."""
        visible = [int((p.positions.long() + 1).sum()) for p in self.queries]
        return visible.index(max(visible))

    def pairs(self, querying: int, holding: int, window: int | None = None) -> int:
        """Return the number of visible pairs of rank `querying`'s queries and `holding`'s keys."""
        queries, keys = self.queries[querying].positions, self.keys[holding].positions
        pairs = torch.searchsorted(keys, queries, right=True).sum()
        if window is not None:
            pairs -= torch.searchsorted(keys, queries - window, right=True).sum()
        return int(pairs)


def shards(scenario: Scenario, active: int) -> Shards:
    """Return the balanced shards of new tokens over a balanced cache."""
    cached = balanced([scenario.cached], scenario.cp).placements()
    held = [[placement.tokens] for placement in cached]
    layout = balanced(
        [scenario.new], scenario.cp, starts=[scenario.cached], held=held, active=active
    )
    queries = layout.placements()
    return Shards(
        cached, queries, tuple(concat(*pair) for pair in zip(cached, queries, strict=True))
    )


def build(scenario: Scenario) -> Layer:
    """Return the model's layer with random weights."""
    layer = decoder_layer(scenario.config, 0, scenario.tp).requires_grad_(False)
    weights = {}
    for name, parameter in layer.named_parameters():
        values = torch.empty(parameter.shape, dtype=scenario.dtype, device=scenario.device)
        weights[name] = values.fill_(1.0) if values.dim() == 1 else values.normal_(std=0.02)
    layer.load_state_dict(weights, assign=True)
    if scenario.fp8:
        for name in ("gate_up_proj", "down_proj"):
            product = layer.mlp.get_submodule(name)
            weight = Fp8Weight(packed(product.get_parameter("weight")), scenario.dtype)
            del product.weight
            vars(product)["weight"] = weight  # a plain attribute: it is no tensor
    return layer.eval()


def run_once(
    scenario: Scenario, layer: Layer, variant: str, held: Shards, rank: int
) -> tuple[Trace, list[int], int]:
    """Run one pass. Return its trace, the bytes of each all-reduce, and the bytes sent."""
    config, device, dtype = scenario.config, scenario.device, scenario.dtype
    timeline = Timeline(device)
    reduced: list[int] = []
    ring = EmulatedRing(rank, scenario.cp, timeline)
    step = Step(rank, held.queries, held.keys if find(variant).keys_travel else ())
    mine = held.queries[rank]
    cache = KVCache(
        layers=1,
        kv_heads=scenario.kv_heads,
        head_dim=config.head_dim,
        batch=1,
        dtype=dtype,
        device=device,
    )
    cache.reserve([held.keys[rank].tokens])
    cache.extend(held.cached[rank])
    cache.tokens_from(0, 0, 0).normal_()
    cache.extend(mine)
    hidden = torch.randn(mine.tokens, config.hidden_size, dtype=dtype, device=device)
    tables = rotary_tables(mine.positions, inverse_frequencies(config).to(device))

    def attention(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cache.store(0, k, v)
        timeline.mark("attention")
        scores = Scores.of(config, 0)
        out = attend(variant, q, cache.layer(0), step, ring=ring, scores=scores)
        timeline.mark(OTHER)
        return out

    @contextmanager
    def marked(name: str) -> Iterator[None]:
        timeline.mark(name)
        yield
        timeline.mark(OTHER)

    for name, module in layer.named_modules():
        if isinstance(module, Product):
            label = name.rpartition(".")[2]
            module.span = partial(marked, label)
            if scenario.tp > 1 and label in REDUCED:
                module.reduce = lambda partial_sum: reduced.append(partial_sum.nbytes)
    timeline.mark(OTHER)
    layer(hidden, *tables, attention)
    timeline.mark(OTHER)
    return timeline.trace(), reduced, ring.sent_bytes


def time_once(scenario: Scenario, mine: Placement) -> dict[str, float]:
    """Return the seconds of work outside layers: embedding, rotary tables, logits of one row."""
    config, device = scenario.config, scenario.device
    size = (config.vocab_size, config.hidden_size)
    table = torch.empty(size, dtype=scenario.dtype, device=device).normal_(std=0.02)
    tokens = torch.randint(config.vocab_size, (mine.tokens,), device=device)
    frequencies, row = inverse_frequencies(config).to(device), table[:1].clone()

    def timed(work: Callable[[], object]) -> float:
        spent: list[float] = []
        for _ in range(4):
            timeline = Timeline(device)
            timeline.mark("work")
            work()
            timeline.mark("end")
            spent += [entry.seconds for entry in timeline.trace() if isinstance(entry, Compute)]
        return statistics.median(spent[1:])

    return {
        "embedding": timed(lambda: functional.embedding(tokens, table)),
        "rotary tables": timed(lambda: rotary_tables(mine.positions, frequencies)),
        "logits of the last token": timed(lambda: functional.linear(row, table)),
    }
