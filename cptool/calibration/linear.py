"""Measuring linear layers: their FLOP/s by rows, and how fast they read weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch

from cptool.calibration.clock import Clock
from cptool.calibration.examples import COLD_BYTES, EXAMPLE, HALF, ROWS, TINY
from cptool.model.config import LlamaConfig
from cptool.model.layer import DecoderLayer
from cptool.model.row_limits import ROWS_AT_ONCE_CPU
from cptool.ops.encodings import BLOCKS
from cptool.ops.kernels import cpu_product_isa
from cptool.ops.linear import FEW_ROWS
from cptool.ops.stored import Blocks, StoredWeight, few_rows, widen
from cptool.planning.cost.counts import attention_parameters, feed_forward_parameters
from cptool.planning.cost.forward import ELEMENT_BYTES, Forward
from cptool.planning.cost.layer import elementwise_bytes
from cptool.planning.linear_rates import RowRates, StoredRates, fitted

STORED = "Q4_K", "Q4_1"
"""Types of GGUF whose weights are timed."""

MOST_ROWS = ROWS_AT_ONCE_CPU
"""The most rows that a CPU is timed at: more go through the feed-forward network in pieces."""


def tiny_layer(clock: Clock, name: str) -> float:
    """Return the seconds of a layer whose products take next to no time."""
    return clock(_layer(clock.device, TINY, getattr(torch, name))(1), calls=16)


def row_rates(clock: Clock, ranks: int, name: str, *, tokenwise: float) -> tuple[RowRates, float]:
    """Return the rates of linear layers by rows while `ranks` ranks compute, and B/s of weights.

    Two layers of different widths are timed: what both take alike does not depend on widths.
    tokenwise: the B/s of the steps between the products.
    """
    dtype = getattr(torch, name)
    edge = min(FEW_ROWS[dtype], ROWS // 16)  # beyond it another kernel is used
    rows = sorted({1 << n for n in range(MOST_ROWS.bit_length())} | {edge, edge + 1})
    # Several calls in a row, as in a model: the first one wakes the core.
    calls = {count: max(1, min(16, 128 // count)) for count in rows}
    works = {}
    for config in (HALF, EXAMPLE):
        layer = _layer(clock.device, config, dtype)
        for count in rows:
            works[f"{config.hidden_size} {count}"] = layer(count, calls[count])
    times = clock.all(works)
    forwards = [
        Forward(config=config, dtype=name, new=1, cached=0, ranks=1, active=1)
        for config in (HALF, EXAMPLE)
    ]
    sizes = [sum(count for count, _ in forward.linear_layers()) for forward in forwards]
    spent = [
        [times[f"{forward.config.hidden_size} {count}"] / calls[count] for count in rows]
        for forward in forwards
    ]
    read = max(spent[1][0] - spent[0][0], 0.05 * spent[1][0])
    weights = (sizes[1] - sizes[0]) * ELEMENT_BYTES[name] / read
    products = [
        [
            max(0.05 * took, took - count * elementwise_bytes(forward) / tokenwise)
            for count, took in zip(rows, taken, strict=True)
        ]
        for forward, taken in zip(forwards, spent, strict=True)
    ]
    return fitted(ranks, rows, *zip(sizes, products, strict=True)), weights


def device_rates(
    clock: Clock, name: str, overhead: float, *, tokenwise: float
) -> tuple[float, float]:
    """Return the FLOP/s of products of many rows and the B/s of reading weights, where one kernel
    computes any number of rows. tokenwise: the B/s of the steps between the products.
    """
    few = 12
    layer = _layer(clock.device, EXAMPLE, getattr(torch, name))
    one, some, many = (clock(layer(rows), calls=max(1, 4 // rows)) for rows in (1, few, ROWS))
    forward = Forward(config=EXAMPLE, dtype=name, new=1, cached=0, ranks=1, active=1)
    parameters = sum(count for count, _ in forward.linear_layers())
    weights = parameters * ELEMENT_BYTES[name] / max(one - overhead, 0.05 * one)
    small = elementwise_bytes(forward) / tokenwise
    flops = 2 * parameters * (ROWS - few)
    return flops / max(many - some - small * (ROWS - few), 0.05 * many), weights


def stored_rates(clock: Clock) -> StoredRates:
    """Return the rates of weights as files store them, in two types of 4 bits.

    As in `row_rates`, what layers of different widths take alike does not depend on widths.
    """
    calls = 16
    made = [_layer(clock.device, config, torch.float32, stored=True) for config in (HALF, EXAMPLE)]
    parts = [_blocks(EXAMPLE.hidden_size, EXAMPLE.hidden_size, encoding) for encoding in STORED]
    rows, panel = min(map(few_rows, parts)), torch.empty(parts[0].shape)
    works = {"small": made[0](1, calls), "large": made[1](1, calls), "few": made[1](rows, calls)}
    times = clock.all({**works, "widen": lambda: widen(parts[0], 0, panel)})
    small, large, few = (times[name] / calls for name in works)
    sizes = [
        attention_parameters(config) + feed_forward_parameters(config) for config in (HALF, EXAMPLE)
    ]
    each = max(large - small, 0.05 * large) / (sizes[1] - sizes[0])
    return StoredRates(
        rows=rows,
        direct=1 / each,
        more=max(0.0, few - large) / (max(1, rows - 1) * sizes[1] * each),
        widened=panel.numel() / times["widen"],
        layer_s=max(0.0, small - sizes[0] * each),
        panels=not cpu_product_isa(),
    )


def _blocks(rows: int, depth: int, encoding: str) -> Blocks:
    weights, size = BLOCKS[encoding]
    return Blocks(torch.zeros(rows, depth // weights * size, dtype=torch.uint8), encoding)


def _store(layer: DecoderLayer) -> None:
    """Have the products of a layer take weights as a GGUF file stores them: a matrix a part."""
    attention, mlp = layer.self_attn, layer.mlp
    dim = attention.head_dim
    query, kv = dim * attention.num_heads, dim * attention.num_kv_heads
    gate = mlp.down_proj.in_features
    products = (
        (attention.qkv_proj, (query, kv, kv), STORED[0]),
        (attention.o_proj, (attention.o_proj.out_features,), STORED[1]),
        (mlp.gate_up_proj, (gate, gate), STORED[0]),
        (mlp.down_proj, (mlp.down_proj.out_features,), STORED[1]),
    )
    for module, heights, encoding in products:
        del module.weight
        parts = [_blocks(height, module.in_features, encoding) for height in heights]
        vars(module)["weight"] = StoredWeight(parts)


def _layer(
    device: torch.device, config: LlamaConfig, dtype: torch.dtype, *, stored: bool = False
) -> Callable[..., Callable[[], None]]:
    """Return a function of (rows, calls) that returns the work of `calls` calls in a row.

    A call runs a decoder layer of the model without its attention; weights lie in no cache.
    stored: whether they are as a file stores them.
    """

    def made() -> DecoderLayer:
        layer = DecoderLayer(config, 0, 1, device).to(dtype)
        for parameter in layer.parameters():
            parameter.fill_(0.02)
        if stored:
            _store(layer)
        return layer

    layers = [made()]
    weights = sum(parameter.nbytes for parameter in layers[0].parameters())
    if stored:
        weights = (attention_parameters(config) + feed_forward_parameters(config)) // 2
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
