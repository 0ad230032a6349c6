"""How long the linear layers of a decoder layer take from one row to many, as it was measured.

Their rate depends on the rows in no simple way. One row waits for the weights. A few more are as
many multiplications on the way. From some number on another kernel is called, which packs the
weights first, and only hundreds of rows bring it near its peak.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

BEYOND = 2
"""How many entries before the last one the line begins that tells of more rows."""


@dataclass(frozen=True)
class RowRates:
    """Of one rank while `ranks` of them compute at the same time, with weights that no cache holds.

    ranks: in ranks of the profile's threads; a fraction after a rank was given more of them.
    rows: ascending, from 1 on, at least three. layer_s: seconds of a layer with so many rows
    whatever its widths: calls, and what small matrices lose. flops: FLOP/s of its products
    otherwise, reading the weights included.
    """

    ranks: float
    rows: tuple[int, ...]
    layer_s: tuple[float, ...]
    flops: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for what no measurement gives."""
        lengths = {len(self.rows), len(self.layer_s), len(self.flops)}
        if len(lengths) > 1 or len(self.rows) <= BEYOND:
            raise ValueError("row_rates have columns of different lengths, or fewer than 3 rows")
        if self.rows[0] != 1 or any(a >= b for a, b in itertools.pairwise(self.rows)):
            raise ValueError(f"row_rates.rows are {self.rows}; they must ascend from 1")
        if not all(0 < value < math.inf for value in (self.ranks, *self.flops)):
            raise ValueError(f"row_rates.flops are {self.flops}; they must be positive")
        if not all(0 <= value < math.inf for value in self.layer_s):
            raise ValueError(f"row_rates.layer_s are {self.layer_s}; they must not be negative")

    def layer(self, rows: float) -> float:
        """Seconds of a layer whatever its widths."""
        return self._at(rows, self.layer_s)

    def product(self, parameters: float, rows: float) -> float:
        """Seconds of `rows` rows and a matrix."""
        return parameters * self._at(rows, self._seconds)

    @property
    def flops_of_many(self) -> float:
        """FLOP/s at which further rows come, where they are many."""
        more, fewer = -1, -1 - BEYOND
        seconds = max(self._seconds[more] - self._seconds[fewer], 0.05 * self._seconds[more])
        return 2 * (self.rows[more] - self.rows[fewer]) / seconds

    def scaled(self, factor: float) -> RowRates:
        """With compute and memory that many times as fast."""
        return RowRates(
            self.ranks, self.rows, self.layer_s, tuple(factor * rate for rate in self.flops)
        )

    @property
    def _seconds(self) -> tuple[float, ...]:
        """Of a parameter."""
        return tuple(2 * rows / rate for rows, rate in zip(self.rows, self.flops, strict=True))

    def _at(self, rows: float, seconds: Sequence[float]) -> float:
        """On the line between the measured numbers of rows around `rows`.

        The busiest rank has a whole number of rows.
        """
        rows = max(1, math.ceil(rows))
        high = bisect_left(self.rows, rows)
        if high < len(self.rows) and self.rows[high] == rows:
            return seconds[high]
        low = high - 1
        if high == len(self.rows):
            low, high = high - 1 - BEYOND, high - 1
        slope = (seconds[high] - seconds[low]) / (self.rows[high] - self.rows[low])
        return seconds[high] + max(0.0, slope) * (rows - self.rows[high])


def fitted(
    ranks: float,
    rows: Sequence[int],
    small: tuple[float, Sequence[float]],
    large: tuple[float, Sequence[float]],
) -> RowRates:
    """From (parameters of a layer, its seconds by row) of a small one and of a large one."""
    each = [
        max(more - less, 0.05 * more) / (large[0] - small[0])
        for less, more in zip(small[1], large[1], strict=True)
    ]
    whatever = [
        max(0.0, spent - small[0] * parameter)
        for spent, parameter in zip(small[1], each, strict=True)
    ]
    flops = tuple(2 * count / parameter for count, parameter in zip(rows, each, strict=True))
    return RowRates(ranks, tuple(rows), tuple(whatever), flops)


def nearest(measured: Sequence[RowRates], ranks: float) -> RowRates | None:
    """What holds while `ranks` ranks compute; None where nothing was measured."""
    return min(measured, key=lambda m: abs(math.log(m.ranks / ranks)), default=None)
