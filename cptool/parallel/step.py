"""What attention reads in one forward: whose tokens lie where, and one layer's keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from cptool.sharding import Placement, union


@dataclass(frozen=True)
class Step:
    """What all layers of one forward share; tensors on the device of the queries.

    rank: this CP rank. queries[r]: the new tokens of rank r. keys[r]: all tokens whose KV rank r
    holds, the new ones included; it may be empty for variants in which no keys travel.

    partial_dtype: dtype in which outputs of partials travel, float32 or q's; their log-sum-exps are
    float32 always. With u the unit roundoff of q's dtype, the result rounds once: it errs by
    u |out| beside the float32 sums' own error. Partials in q's dtype halve what 16-bit queries send
    back, and are rounded before the merge, whose weights sum to 1: that adds at most u max|v|, one
    more rounding of values as large as the largest partial. No such error is in pass-kv and
    gather-kv, whose partials do not travel.
    """

    rank: int
    queries: tuple[Placement, ...]
    keys: tuple[Placement, ...]
    partial_dtype: torch.dtype = torch.float32

    @cached_property
    def query_sizes(self) -> list[int]:
        return [placement.tokens for placement in self.queries]

    @cached_property
    def asking(self) -> list[bool]:
        """Whether rank r has queries."""
        return [size > 0 for size in self.query_sizes]

    @cached_property
    def key_sizes(self) -> list[int]:
        return [placement.tokens for placement in self.keys]

    @cached_property
    def all_queries(self) -> tuple[Placement, torch.Tensor]:
        return union(self.queries)

    @cached_property
    def all_keys(self) -> tuple[Placement, torch.Tensor]:
        return union(self.keys)

    @cached_property
    def rows(self) -> list[torch.Tensor]:
        """Where each rank's queries lie in `all_queries`."""
        return list(torch.split(self.all_queries[1].argsort(), self.query_sizes))


@dataclass(frozen=True)
class LayerKV:
    """One layer of a cache, as attention reads it.

    `local` is `(k, v, k_pos, cu_k)`: k and v `[slots, kv_heads, head_dim]` strided views of the
    slab, k_pos int32 `[slots]` with `NEVER` in slack slots, cu_k int32 `[batch + 1]`.
    """

    slab: torch.Tensor
    k_pos: torch.Tensor
    cu_k: torch.Tensor
    held_slots: torch.Tensor | None

    @property
    def local(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.slab[:, 0], self.slab[:, 1], self.k_pos, self.cu_k

    def packed(self) -> torch.Tensor:
        """The tokens held, without slack: `[tokens, 2, kv_heads, head_dim]`, contiguous; a view if
        there is no slack.
        """
        return self.slab if self.held_slots is None else self.slab.index_select(0, self.held_slots)
