"""Which tokens every CP rank holds, tracked by each rank from the same arithmetic.

Counts decide which rank takes the next tokens; positions are sent along where keys travel. Both
change at every step, so counts are plain integers and positions are only put together on request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from cptool.cache import nothing_held, truncated
from cptool.sharding import Held, Placement, concat, next_owner


class Holdings:
    """The tokens of `batch` sequences whose KV each of `ranks` CP ranks holds.

    counts[r][b]: tokens of sequence b that rank r holds, including those dealt by `deal`.
    """

    def __init__(self, ranks: int, batch: int) -> None:
        self.batch = batch
        self.replace([nothing_held(batch, "cpu")] * ranks)

    @property
    def ranks(self) -> int:
        """Number of CP ranks."""
        return len(self.counts)

    def replace(self, held: Sequence[Placement]) -> None:
        """Start over with held[r] on rank r, as after a session was restored."""
        self.counts: Held = [placement.cu_seqlens.diff().tolist() for placement in held]
        self._parts = [[placement] for placement in held]
        self._dealt = self._nothing_dealt()

    def append(self, added: Sequence[Placement]) -> None:
        """Record that rank r has been given the new tokens added[r]."""
        for counts, parts, placement in zip(self.counts, self._parts, added, strict=True):
            parts.append(placement)
            for b, count in enumerate(placement.cu_seqlens.diff().tolist()):
                counts[b] += count

    def deal(self, positions: dict[int, int]) -> dict[int, int]:
        """Deal one token of each sequence b, at positions[b], and return the rank that keeps it.

        Tokens go to the ranks that `cptool.sharding.dealt` would give them to. `settle` must
        follow the last deal before anything but `counts` and `room` is used.
        """
        owners = {}
        for b, position in positions.items():
            owner = next_owner([counts[b] for counts in self.counts], b % self.ranks)
            self.counts[owner][b] += 1
            self._dealt[owner][b].append(position)
            owners[b] = owner
        return owners

    def settle(self) -> tuple[Placement, ...]:
        """Return what each rank has been dealt since the last call, now part of `placements`."""
        dealt = tuple(
            Placement.of([torch.tensor(row, dtype=torch.int32) for row in rows])
            for rows in self._dealt
        )
        for parts, placement in zip(self._parts, dealt, strict=True):
            parts.append(placement)
        self._dealt = self._nothing_dealt()
        return dealt

    def placements(self) -> tuple[Placement, ...]:
        """Return what every rank holds, on the CPU, in rank order."""
        self._parts = [[concat(*parts)] for parts in self._parts]
        return tuple(parts[0] for parts in self._parts)

    def truncate(self, limits: Sequence[int]) -> None:
        """Drop the tokens of sequence b whose position is limits[b] or more."""
        self.replace([truncated(placement, limits) for placement in self.placements()])

    def room(self, rank: int, sequences: Iterable[int], steps: int) -> list[int]:
        """Return the slots that each sequence needs on `rank` to `deal` it `steps` more tokens."""
        most = list(self.counts[rank])
        for b in sequences:
            most[b] = max(most[b], highest_count([counts[b] for counts in self.counts], steps))
        return most

    def _nothing_dealt(self) -> list[list[list[int]]]:
        return [[[] for _ in range(self.batch)] for _ in self.counts]


def highest_count(counts: Sequence[int], steps: int) -> int:
    """Return the count up to which `next_owner` fills the ranks in `steps` further tokens.

    Each token goes to a rank with the fewest, so ranks rise to the lowest level that has room for
    all of them; ranks above that level get none.
    """
    low, high = min(counts), min(counts) + steps
    while low < high:
        middle = (low + high) // 2
        if sum(max(0, middle - count) for count in counts) < steps:
            low = middle + 1
        else:
            high = middle
    return low
