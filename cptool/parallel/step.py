"""What attention reads in one forward: whose tokens lie where."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from cptool.sharding import Placement, union


@dataclass(frozen=True)
class Step:
    """What all layers of one forward share; tensors on the device of the queries.

    rank: this CP rank.
    queries[r]: the new tokens of rank r.
    keys[r]: all tokens whose KV rank r holds, the new ones included; may be empty for variants in
        which no keys travel.
    partial_dtype: dtype in which outputs of partials travel, float32 or q's; their log-sum-exps
        always travel in float32.

    With u the unit roundoff of q's dtype, the result rounds once: it errs by
    u |out| beside the float32 sums' own error. Partials in q's dtype halve what 16-bit queries send
    back, and are rounded before the merge, whose weights sum to 1: that adds at most u max|v|, one
    more rounding of values as large as the largest partial. Variants in which keys travel have no
    such error.
    """

    rank: int
    queries: tuple[Placement, ...]
    keys: tuple[Placement, ...]
    partial_dtype: torch.dtype = torch.float32

    @cached_property
    def query_sizes(self) -> list[int]:
        """Number of new tokens per rank."""
        return [placement.tokens for placement in self.queries]

    @cached_property
    def has_queries(self) -> list[bool]:
        """Whether rank r has queries."""
        return [size > 0 for size in self.query_sizes]

    @cached_property
    def key_sizes(self) -> list[int]:
        """Number of keys per rank."""
        return [placement.tokens for placement in self.keys]

    @cached_property
    def all_queries(self) -> tuple[Placement, torch.Tensor]:
        """`union` of the new tokens of all ranks."""
        return union(self.queries)

    @cached_property
    def all_keys(self) -> tuple[Placement, torch.Tensor]:
        """`union` of the keys of all ranks."""
        return union(self.keys)

    @cached_property
    def rows(self) -> list[torch.Tensor]:
        """Where each rank's queries lie in `all_queries`."""
        return list(torch.split(self.all_queries[1].argsort(), self.query_sizes))
