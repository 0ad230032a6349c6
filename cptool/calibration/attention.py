"""Measuring attention: its FLOP/s, and how fast it reads keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch

from cptool.calibration.clock import Clock, slope
from cptool.calibration.examples import COLD_BYTES, EXAMPLE, ROWS
from cptool.host import large_pages
from cptool.ops.attention import attention_partial
from cptool.ops.kernels import cpu_stream_rows
from cptool.planning.cost.forward import ELEMENT_BYTES

BLOCK = 16
"""Queries of a block, 64 rows per KV head of EXAMPLE: a CPU packs keys and values for them, as for
many queries."""

_WIDTHS = EXAMPLE.num_attention_heads, EXAMPLE.num_key_value_heads, EXAMPLE.head_dim


def attention_rates(clock: Clock, dtype: torch.dtype) -> tuple[float, dict[str, Any]]:
    """Measure attention in `dtype`.

    Return the FLOP/s of visible pairs, and the other fields of the profile that describe attention:
    how fast keys and values are read, and what a call costs.
    """
    few_rows = cpu_stream_rows(dtype, EXAMPLE.head_dim) if clock.device.type == "cpu" else 0
    heads, kv_heads, dim = _WIDTHS

    size = 8192, 2, kv_heads, dim
    copies = 1 + COLD_BYTES // (math.prod(size) * dtype.itemsize)
    cold = [large_pages.empty(size, dtype, clock.device).normal_() for _ in range(copies)]

    def call(queries: int, keys: int, first: int) -> Callable[[], object]:
        kv = cold if keys == len(cold[0]) else [cold[0][:keys]]
        return _attend(kv, queries=queries, first=first)

    few_queries = max(1, few_rows * kv_heads // heads)
    empty = clock(call(1, 1, 1), calls=32)
    few = clock.all({"one": call(1, 8192, 8192), "several": call(few_queries, 8192, 8192)}, calls=4)
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
    rate = slope((0, empty), (pair * ROWS * 2048, times["dense"]))
    cut = (times["causal"] - empty) * rate / pair / ROWS - (ROWS + 1) / 2
    one, packing = (
        width * 8192 / max(spent - empty - pair * queries * 8192 / rate, 0.05 * spent)
        for queries, spent in ((1, few["one"]), (BLOCK, times["block"]))
    )
    reading, share = one, 1.0
    if few_rows:  # only the first few rows are computed while keys and values arrive
        alone, several = (max(spent - empty, 0.05 * spent) for spent in few.values())
        each = max(several - alone, 0.05 * several) / max(1, few_queries - 1)
        reading = width * 8192 / max(alone - each, 0.05 * alone)
        share = pair * 8192 / rate / each
        if share > 1:  # further queries cost nothing beside the reading
            reading, share = width * 8192 / max(alone - pair * 8192 / rate, 0.05 * alone), 1.0
    return rate, {
        "cache_bandwidth": reading,
        "few_query_rows": few_rows,
        "few_query_rate": share,
        "block_bandwidth": min(one, packing),
        "call_overhead_s": empty,
        "attention_ramp": min(max(0.0, cut), ROWS / 2),
    }


def _attend(blocks: list[torch.Tensor], *, queries: int, first: int) -> Callable[[], object]:
    """Return an attention call with EXAMPLE's heads: queries from position `first` on over one of
    the blocks of KV, of equal size, after the other.
    """
    keys, device = len(blocks[0]), blocks[0].device
    heads, _, dim = _WIDTHS
    q = torch.randn(queries, heads, dim, device=device).to(blocks[0].dtype)
    q_pos, k_pos = (
        torch.arange(start, start + count, dtype=torch.int32, device=device)
        for start, count in ((first, queries), (0, keys))
    )
    cu_q, cu_k = (
        torch.tensor([0, count], dtype=torch.int32, device=device) for count in (queries, keys)
    )
    following = cycle(blocks)

    def attend() -> None:
        kv = next(following)
        attention_partial(
            q,
            kv[:, 0],
            kv[:, 1],
            q_pos=q_pos,
            k_pos=k_pos,
            cu_q=cu_q,
            cu_k=cu_k,
            scale=dim**-0.5,
        )

    return attend
