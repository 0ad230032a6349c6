"""How many rows may go together through the ops of a layer, so that none changes another's bits.

A row's result in products, norms, rotation and SwiGLU, and a query's in attention, has the same
bits whatever other rows and queries go with it, up to the numbers that these functions return. With
more of them a faster kernel may take over, which sums in another order. Speculation rests on it
(`cptool.engine.drafts`): a token that is checked among drafts gets the logits that it gets alone.

The other steps of a layer treat each row by itself, however many there are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cptool.ops import linear
from cptool.ops.kernels import cpu_stream_rows
from cptool.ops.stored import StoredWeight

MOST_ROWS = 64
"""More are never promised."""

_STREAM_TOKENS, _STREAM_ROWS = 8, 32
"""Query tokens that count as few rows where so many rows do (`csrc/cpu/stream_kernel.h`)."""


def independent_rows(dtype: torch.dtype, weights: Iterable[torch.Tensor | StoredWeight]) -> int:
    """Return up to how many rows of `dtype` the products with all of `weights` are independent; 1
    on a device other than a CPU.
    """
    most = MOST_ROWS
    for weight in weights:
        if isinstance(weight, StoredWeight):
            most = min(most, weight.independent_rows)
        else:
            most = min(most, linear.FEW_ROWS[dtype] if weight.is_cpu else 1)
    return most


def independent_queries(
    dtype: torch.dtype, kv_dtype: torch.dtype, *, head_dim: int, group: int
) -> int:
    """Return up to how many queries of each sequence are independent in attention on a CPU.

    dtype: of the queries; kv_dtype: of keys and values. group: query heads per KV head.
    """
    rows = cpu_stream_rows(dtype, head_dim, kv_dtype)
    if not rows:
        return MOST_ROWS  # one way to read keys
    tokens = rows // group
    return min(MOST_ROWS, max(tokens, _STREAM_TOKENS) if rows >= _STREAM_ROWS else max(tokens, 1))
