"""Which rank holds which positions.

Pure arithmetic on lengths: every rank computes every other rank's placement by itself, so no size
and no position ever travels. A placement is described by ranges first; tensors are built from
ranges.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch

Range = tuple[int, int]

Held = list[list[int]]
"""Held[r][b]: tokens of sequence b that rank r holds."""

_FEW_TOKENS = 64
"""Average tokens per range up to which Python expands ranges faster than torch."""


@dataclass(frozen=True)
class Placement:
    """The tokens that one rank holds, sequences concatenated.

    positions: int32 [T], absolute positions, ascending within each sequence.
    cu_seqlens: int32 [B + 1], sequence b is positions[cu_seqlens[b]:cu_seqlens[b + 1]].
    """

    positions: torch.Tensor
    cu_seqlens: torch.Tensor

    @staticmethod
    def of(sequences: Sequence[torch.Tensor]) -> Placement:
        """Return the placement of one int32 tensor of ascending positions per sequence."""
        ends = list(accumulate(map(len, sequences), initial=0))
        return Placement(torch.cat(list(sequences)), torch.tensor(ends, dtype=torch.int32))

    @property
    def tokens(self) -> int:
        """Number of tokens, all sequences together."""
        return self.positions.numel()

    @property
    def batch(self) -> int:
        """Number of sequences, empty ones included."""
        return self.cu_seqlens.numel() - 1

    def sequences(self) -> tuple[torch.Tensor, ...]:
        """Return one view of `positions` per sequence."""
        return torch.split(self.positions, self.cu_seqlens.diff().tolist())

    def to(self, device: torch.device | str) -> Placement:
        """Return the same placement with its tensors on `device`."""
        return Placement(self.positions.to(device), self.cu_seqlens.to(device))


def concat(first: Placement, *later: Placement) -> Placement:
    """Return `first`, then `later`, sequence by sequence: what a rank holds after some steps.

    New positions lie after older ones of the same sequence, so the result ascends. Raises
    ValueError when they differ in their number of sequences.
    """
    for new in later:
        if new.batch != first.batch:
            raise ValueError(f"new has {new.batch} sequences; it must have {first.batch} too")
    parts = [part for part in (first, *later) if part.tokens]
    if len(parts) < 2:
        return parts[0] if parts else first
    pieces = zip(*(part.sequences() for part in parts), strict=True)
    return Placement(
        torch.cat([piece for sequence in pieces for piece in sequence]),
        torch.stack([part.cu_seqlens for part in parts]).sum(0, dtype=torch.int32),
    )


def union(placements: Sequence[Placement]) -> tuple[Placement, torch.Tensor]:
    """Return all ranks' tokens as one placement, ascending within each sequence, and where they
    come from.

    Returns the union and an int64 [T] `order`: the union's token i is token order[i] of the ranks'
    tokens concatenated in rank order.
    """
    first = placements[0]
    sequence = torch.arange(first.batch, device=first.positions.device)
    keys = [
        (sequence.repeat_interleave(p.cu_seqlens.diff()) << 32) + p.positions for p in placements
    ]
    ordered, order = torch.cat(keys).sort()
    cu_seqlens = torch.stack([p.cu_seqlens for p in placements]).sum(0, dtype=torch.int32)
    return Placement((ordered & 0xFFFFFFFF).to(torch.int32), cu_seqlens), order


@dataclass(frozen=True)
class Layout:
    """How the new tokens of a batch are dealt to `active` of `ranks` ranks; see `balanced`.

    bounds: of each sequence, the 2 * active + 1 absolute positions where its chunks begin and end.
    rotation: of each sequence, the rank that takes its first and its last chunk.

    Plain integers: a decode step needs a handful, where each operation of torch takes as long as
    all of this.
    """

    ranks: int
    active: int
    bounds: tuple[tuple[int, ...], ...]
    rotation: tuple[int, ...]

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.bounds)

    def ranges(self, rank: int, seq: int) -> list[Range]:
        """Return ranges [start, stop) of sequence `seq` on `rank`, ascending, none empty or
        adjacent.
        """
        first = (rank - self.rotation[seq]) % self.ranks
        bounds = self.bounds[seq]
        if first >= self.active or bounds[0] == bounds[-1]:
            return []
        last = 2 * self.active - 1 - first
        low, high, start, stop = *bounds[first : first + 2], *bounds[last : last + 2]
        pieces = [(low, stop)] if high == start else [(low, high), (start, stop)]
        return [piece for piece in pieces if piece[0] < piece[1]]

    def placement(self, rank: int) -> Placement:
        """Return the positions of the new tokens on `rank`."""
        sequences = [self.ranges(rank, seq) for seq in range(self.batch)]
        ends = accumulate(map(_total, sequences), initial=0)
        return Placement(
            _members(chain.from_iterable(sequences), torch.int32),
            torch.tensor(list(ends), dtype=torch.int32),
        )

    def placements(self) -> tuple[Placement, ...]:
        """Return `placement` of every rank, in rank order."""
        return tuple(self.placement(rank) for rank in range(self.ranks))

    def indices(self, rank: int) -> torch.Tensor:
        """Return int64 [T]: where this rank's tokens lie in the concatenation of all new tokens."""
        ranges, before = [], 0
        for seq, bounds in enumerate(self.bounds):
            shift = before - bounds[0]
            ranges += [(start + shift, stop + shift) for start, stop in self.ranges(rank, seq)]
            before += bounds[-1] - bounds[0]
        return _members(ranges, torch.int64)

    def owner(self, seq: int, position: int) -> int:
        """Return the rank that holds `position` of sequence `seq`. Raises ValueError if it is not a
        new token.
        """
        bounds = self.bounds[seq]
        if not bounds[0] <= position < bounds[-1]:
            raise ValueError(
                f"position is {position}; it must be a new token of sequence {seq}, "
                f"{bounds[0]} to {bounds[-1] - 1}"
            )
        chunk = bisect_right(bounds, position) - 1
        return (min(chunk, 2 * self.active - 1 - chunk) + self.rotation[seq]) % self.ranks

    def tokens(self, rank: int) -> int:
        """Return the number of new tokens on `rank`, all sequences together."""
        return sum(_total(self.ranges(rank, seq)) for seq in range(self.batch))


@dataclass(frozen=True)
class Dealt:
    """How the few new tokens of decode steps are dealt, one by one; see `dealt`.

    starts: position of the first new token of each sequence.
    owners: of each sequence, the rank of each new token.
    """

    ranks: int
    starts: tuple[int, ...]
    owners: tuple[tuple[int, ...], ...]

    def placements(self) -> tuple[Placement, ...]:
        """Return the positions of the new tokens on each rank, in rank order."""
        pairs = list(zip(self.starts, self.owners, strict=True))
        found = []
        for rank in range(self.ranks):
            rows = [[p for p, owner in enumerate(o, s) if owner == rank] for s, o in pairs]
            ends = list(accumulate(map(len, rows), initial=0))
            found.append(
                Placement(
                    torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int32),
                    torch.tensor(ends, dtype=torch.int32),
                )
            )
        return tuple(found)

    def indices(self, rank: int) -> torch.Tensor:
        """Return int64 [T]: where this rank's tokens lie in the concatenation of all new tokens."""
        owners = chain.from_iterable(self.owners)
        members = [i for i, owner in enumerate(owners) if owner == rank]
        return torch.tensor(members, dtype=torch.int64)


def dealt(lengths: Sequence[int], starts: Sequence[int], held: Held) -> Dealt:
    """Deal the new tokens of decode steps: `lengths[b]` of sequence b, from position `starts[b]`.

    held[r][b]: tokens of sequence b that rank r holds.

    Each token goes to the `next_owner` of its sequence, searched from rank b modulo their number.
    So the owner depends on the sequence alone, not on how many tokens a step has of it or on which
    others take part: a token lies where it lies if all are computed one at a time. Sequences that
    begin to be dealt at equal counts begin on different ranks.
    """
    ranks, owners = len(held), []
    for b, length in enumerate(lengths):
        counts, row = [counts[b] for counts in held], []
        for _ in range(length):
            row.append(next_owner(counts, b % ranks))
            counts[row[-1]] += 1
        owners.append(tuple(row))
    return Dealt(ranks, tuple(starts), tuple(owners))


def next_owner(counts: Sequence[int], first: int) -> int:
    """Return the rank that takes a sequence's next token (paper, algorithm 4).

    counts: tokens of the sequence that each rank holds. Of the ranks that hold the fewest, it is
    the first at or after rank `first`, cyclically, so that ranks stay within one token of each
    other. `balanced` deals prompts by this rule, `dealt` and `cptool.engine.holdings` the tokens of
    decode steps.
    """
    fewest, ranks = min(counts), len(counts)
    return next(r % ranks for r in range(first, first + ranks) if counts[r % ranks] == fewest)


def balanced(
    lengths: Sequence[int],
    ranks: int,
    starts: Sequence[int] | None = None,
    held: Sequence[Sequence[int]] | None = None,
    active: int | None = None,
) -> Layout:
    """Deal new tokens so that causal work and KV memory are balanced, without padding.

    lengths: new tokens of each sequence; sequence b gets positions
        [starts[b], starts[b] + lengths[b]). starts defaults to 0 (nothing cached).
    held: held[r][b] tokens of sequence b that rank r holds already; defaults to none.
    active: how many of the ranks take new tokens (a prompt may be too short for all); default all.

    Each sequence is cut into 2N chunks and relative rank i takes chunks i and 2N-1-i: an early and
    a late one, so that all ranks see the same number of visible keys (paper, section 4.2). The
    T mod 2N tokens that do not divide go one each to chunks 0..N-1, then 2N-1, 2N-2, ..N, that is
    to relative ranks 0..N-1 and then again. Relative rank 0 of a sequence is its `next_owner`,
    searched from where the previous sequence's extras ended. So with nothing held, ranks differ by
    at most one token over the whole batch; and one-token sequences are dealt round-robin, moving on
    by one rank per step, with at most one token between the ranks of any sequence, whichever others
    leave the batch. Sequences without new tokens take no part.

    Raises ValueError for ranks < 1, active outside of 1 to ranks, a negative length or start, or
    starts or held of another size.
    """
    active = ranks if active is None else active
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; it must be at least 1")
    if not 1 <= active <= ranks:
        raise ValueError(f"active is {active}; it must be 1 to {ranks}")
    if starts is not None and len(starts) != len(lengths):
        raise ValueError(f"starts has {len(starts)} entries; it must have {len(lengths)}")
    if held is not None and [len(counts) for counts in held] != [len(lengths)] * ranks:
        raise ValueError(f"held must have {ranks} entries of {len(lengths)} counts")
    starts = [0] * len(lengths) if starts is None else starts
    for name, values in (("lengths", lengths), ("starts", starts)):
        if min(values, default=0) < 0:
            raise ValueError(f"{name} contains {min(values)}; it must hold counts of tokens")

    chunks = 2 * active
    # order[c]: chunk c takes an extra token if there are more than this many of them.
    order = [*range(active), *range(chunks - 1, active - 1, -1)]
    bounds, rotation, cursor = [], [], 0
    for b, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        size, extra = divmod(length, chunks)
        bounds.append(tuple(accumulate((size + (i < extra) for i in order), initial=start)))
        first = cursor
        if held is not None and length:
            first = next_owner([counts[b] for counts in held], cursor)
        rotation.append(first)
        cursor = (first + extra) % ranks
    return Layout(ranks, active, tuple(bounds), tuple(rotation))


def _total(ranges: Iterable[Range]) -> int:
    return sum(stop - start for start, stop in ranges)


def _members(ranges: Iterable[Range], dtype: torch.dtype) -> torch.Tensor:
    """Return the members of ranges, in order."""
    ranges = list(ranges)
    if _total(ranges) <= _FEW_TOKENS * max(1, len(ranges)):
        members = [token for start, stop in ranges for token in range(start, stop)]
        return torch.tensor(members, dtype=dtype)
    return torch.cat([torch.arange(start, stop, dtype=dtype) for start, stop in ranges])
