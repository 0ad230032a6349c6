"""The memory that an emulated rank takes on its device, known before anything is allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cptool.errors import UserError
from cptool.host import memory
from cptool.model.row_limits import ROWS_AT_ONCE
from cptool.planning.cost.counts import matrix_parameters
from cptool.variants import MessageBytes, find

if TYPE_CHECKING:
    from cptool.emulation.layer import Scenario, Shards

_FLOAT32 = 4


def check(scenario: Scenario, variant: str, held: Shards) -> int:
    """Return the bytes that the emulation needs. Raise UserError if the device has fewer free."""
    needed, free = needs(scenario, variant, held), available(scenario.device)
    if needed > free:
        raise UserError(
            f"one rank's part of {scenario.cached + scenario.new:,} tokens needs "
            f"{needed / 1e9:.1f} GB on {scenario.device}, {free / 1e9:.1f} GB are free, "
            f"{(needed - free) / 1e9:.1f} GB too few; use more `cp` or `tp`, or a shorter `context`"
        )
    return needed


def available(device: torch.device) -> int:
    """Return the bytes that can be allocated on `device` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return memory.available()


def needs(scenario: Scenario, variant: str, held: Shards) -> int:
    """Return the bytes at the peak: weights of a layer and the embedding, the residual stream, and
    the larger of what attention and the feed-forward network hold beside it.
    """
    config, size, rank = scenario.config, scenario.dtype.itemsize, held.busiest
    embedding = config.vocab_size * config.hidden_size * size
    weights = matrix_parameters(config) // config.num_hidden_layers // scenario.tp * size
    tokens = held.queries[rank].tokens
    stream = tokens * config.hidden_size * size
    rows = min(tokens, ROWS_AT_ONCE)
    feed_forward = rows * (3 * config.hidden_size + 3 * scenario.ffn) * size
    tables = tokens * config.head_dim * _FLOAT32 + 3 * rows * scenario.heads * 128 * _FLOAT32
    during = _attention(scenario, variant, held, rank) + stream  # the normed input of qkv
    after = 2 * stream  # attention's projected result, and a copy of it
    return embedding + weights + stream + tables + max(during, after, feed_forward)


def _attention(scenario: Scenario, variant: str, held: Shards, rank: int) -> int:
    size, dim = scenario.dtype.itemsize, scenario.config.head_dim
    tokens, keys = held.queries[rank].tokens, held.keys[rank].tokens
    token = 2 * scenario.kv_heads * dim * size
    query = scenario.heads * dim * size
    partial = scenario.heads * (dim + 1) * _FLOAT32
    projected = tokens * (query + token) + tokens * query  # qkv, the merged result
    cache = keys * token
    everything = sum(p.tokens for p in held.keys) * token
    asked = sum(p.tokens for p in held.queries)
    if scenario.cp == 1:
        more = 0
    else:
        sizes = MessageBytes(
            ranks=scenario.cp,
            block=max(p.tokens for p in held.keys) * token,
            everything=everything,
            queries=tokens * query,
            partial=tokens * partial,
            all_queries=asked * query,
            all_partials=asked * partial,
        )
        record = find(variant)
        more = int(record.buffers(sizes))
        if record.ring and not record.keys_travel:
            more += tokens * query  # the contiguous copy that is sent first
    return projected + cache + more
