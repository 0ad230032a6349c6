"""What attention reads in one forward: whose tokens lie where."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from cptool.model.config import LlamaConfig
from cptool.sharding import Placement, union


@dataclass(frozen=True)
class Scores:
    """How a layer's attention scores are made, and what weights they become.

    scale, window, cap: as in `cptool.ops.attention.attention_partial`.
    max_len: None for softmax attention; else attention is that of `cptool.ops.silu_attention`,
        which takes no cap.
    """

    scale: float
    window: int | None = None
    cap: float | None = None
    max_len: int | None = None

    @staticmethod
    def of(config: LlamaConfig, layer: int) -> Scores:
        """Return those of a layer of a model."""
        return Scores(config.scale, config.hiding_window(layer), config.score_cap)


@dataclass(frozen=True)
class Travelling:
    """The keys that leave their rank in a layer.

    keys[r]: those of rank r. rows: which of the tokens that this rank holds are among them, int64;
    None for all.
    """

    keys: tuple[Placement, ...]
    rows: torch.Tensor | None = None

    @cached_property
    def sizes(self) -> list[int]:
        """Number of keys per rank."""
        return [placement.tokens for placement in self.keys]


class Gathered(NamedTuple):
    """Keys of all ranks: their `union`, how many there are of each rank, and which of the tokens
    that this rank holds are among them, int64; None for all.
    """

    keys: Placement
    order: torch.Tensor
    sizes: list[int]
    rows: torch.Tensor | None


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
    def _travelling(self) -> dict[int | None, Travelling]:
        return {None: Travelling(self.keys)}

    def travelling(self, window: int | None) -> Travelling:
        """Return what has to travel for attention with a window: of each rank, the keys that some
        query of another rank sees. Every rank finds the same, from positions alone.

        Without a window that is all keys: queries at the end of a sequence see all of them.
        """
        if window is not None and window not in self._travelling:
            seen = [self._seen_elsewhere(rank, window) for rank in range(len(self.keys))]
            keys = tuple(map(only, self.keys, seen))
            self._travelling[window] = Travelling(keys, seen[self.rank])
        return self._travelling[window]

    def _seen_elsewhere(self, rank: int, window: int) -> torch.Tensor:
        """Return int64 indices of the keys of `rank` that a query of another rank sees."""
        queries, owner, others = self._query_order
        keys = _in_order(self.keys[rank])
        # The first query at or after a key is the first to see it, and the last to lose it.
        first = torch.searchsorted(queries[:-1], keys)
        first = torch.where(owner[first] == rank, others[first], first)
        return _near(queries[first] - keys, window)

    def _seen_here(self, window: int) -> torch.Tensor:
        """Return int64 indices of this rank's keys that one of its own queries sees."""
        keys, queries = map(_in_order, (self.keys[self.rank], self.queries[self.rank]))
        following = torch.searchsorted(queries, keys)
        return _near(torch.cat([queries, _NONE.to(queries)])[following] - keys, window)

    @cached_property
    def _query_order(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The queries of all ranks in order, int64 [T + 1]; whose each is; and the index of the
        next one that is another rank's. The last entry stands for none.
        """
        queries, order = self.all_queries
        device = order.device
        sizes = torch.tensor(self.query_sizes, device=device)
        owner = torch.arange(len(sizes), device=device).repeat_interleave(sizes)[order]
        owner = torch.cat([owner, owner.new_full((1,), -1)])
        _, run, lengths = torch.unique_consecutive(owner, return_inverse=True, return_counts=True)
        ordered = torch.cat([_in_order(queries), _NONE.to(device)])
        return ordered, owner, lengths.cumsum(0)[run]

    @cached_property
    def all_queries(self) -> tuple[Placement, torch.Tensor]:
        """`union` of the new tokens of all ranks."""
        return union(self.queries)

    @cached_property
    def _gathered(self) -> dict[int | None, Gathered]:
        return {}

    def gathered(self, window: int | None) -> Gathered:
        """Return the keys that this rank's queries may see, once those of others are here."""
        if window not in self._gathered:
            keys, rows = list(self.travelling(window).keys), None
            if window is not None:
                rows = self._seen_here(window)
                keys[self.rank] = only(self.keys[self.rank], rows)
            sizes = [placement.tokens for placement in keys]
            self._gathered[window] = Gathered(*union(keys), sizes, rows)
        return self._gathered[window]

    @cached_property
    def rows(self) -> list[torch.Tensor]:
        """Where each rank's queries lie in `all_queries`."""
        return list(torch.split(self.all_queries[1].argsort(), self.query_sizes))


_NONE = torch.tensor([torch.iinfo(torch.int64).max])
"""What stands for the query after the last one."""


def _near(distances: torch.Tensor, window: int) -> torch.Tensor:
    """Return the indices of distances within the window and a sequence: sequences are further apart
    in `_in_order` than any two positions.
    """
    return (distances < min(window, 1 << 31)).nonzero().flatten()


def _in_order(tokens: Placement) -> torch.Tensor:
    """Return int64 [T], ascending over all sequences: the sequence, then the position."""
    sequence = torch.arange(tokens.batch, device=tokens.positions.device)
    return (sequence.repeat_interleave(tokens.cu_seqlens.diff()) << 32) + tokens.positions


def only(tokens: Placement, rows: torch.Tensor) -> Placement:
    """Return the tokens at ascending indices `rows`."""
    ends = torch.searchsorted(rows, tokens.cu_seqlens.to(torch.int64))
    return Placement(tokens.positions[rows], ends.to(torch.int32))
