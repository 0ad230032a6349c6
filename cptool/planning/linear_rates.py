"""The measured time of a decoder layer's linear layers, from one row to many.

Their rate depends on the rows in no simple way. One row waits for the weights; a few more rows
multiply while the weights arrive. From some number on another kernel is used, which packs the
weights first and needs hundreds of rows to come near its peak.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

BEYOND = 2
"""Where the line that extrapolates to more rows begins: this many entries before the last one."""


@dataclass(frozen=True)
class RowRates:
    """Rates per rank while `ranks` ranks compute at the same time, with weights in no cache.

    ranks: counted in ranks of the profile's threads; a fraction after ranks got more threads.
    rows: ascending, from 1, at least three. layer_s: seconds per layer at each number of rows that
    do not depend on widths: calls, and what small matrices lose. flops: FLOP/s of its products
    otherwise, reading the weights included.
    """

    ranks: float
    rows: tuple[int, ...]
    layer_s: tuple[float, ...]
    flops: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raise ValueError for values that no measurement gives."""
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
        """Return the seconds per layer that do not depend on its widths."""
        return self._at(rows, self.layer_s)

    def product(self, parameters: float, rows: float) -> float:
        """Return the seconds of `rows` rows times a matrix of `parameters` elements."""
        return parameters * self._at(rows, self._seconds)

    @property
    def flops_of_many(self) -> float:
        """FLOP/s of further rows where rows are many."""
        more, fewer = -1, -1 - BEYOND
        seconds = max(self._seconds[more] - self._seconds[fewer], 0.05 * self._seconds[more])
        return 2 * (self.rows[more] - self.rows[fewer]) / seconds

    def scaled(self, factor: float) -> RowRates:
        """Return the rates with compute and memory `factor` times as fast."""
        return RowRates(
            self.ranks, self.rows, self.layer_s, tuple(factor * rate for rate in self.flops)
        )

    @property
    def _seconds(self) -> tuple[float, ...]:
        """Seconds per parameter, by rows."""
        return tuple(2 * rows / rate for rows, rate in zip(self.rows, self.flops, strict=True))

    def _at(self, rows: float, seconds: Sequence[float]) -> float:
        """Interpolate `seconds` linearly between the measured numbers of rows around `rows`.

        `rows` is rounded up: the busiest rank has a whole number of them.
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


@dataclass(frozen=True, kw_only=True)
class StoredRates:
    """How fast a CPU multiplies float32 rows with weights that stay as a file stores them.

    rows: up to how many rows the weights are multiplied as they are. direct: weights per second
    that are multiplied with one row. more: the part of its time that each further row adds.
    widened: weights per second that are widened for more rows. layer_s: seconds per layer of few
    rows that do not depend on its widths; its steps are calls of their own, while other layers of
    few rows take two. panels: whether many rows are multiplied with a panel of widened weights at a
    time, whose result is then copied to its place; else one kernel widens as it goes.
    """

    rows: int
    direct: float
    widened: float
    layer_s: float
    more: float = 0.0
    panels: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for values that no measurement gives."""
        costs = (self.layer_s, self.more)
        if self.rows < 1 or not all(0 <= cost < math.inf for cost in costs):
            raise ValueError(f"stored is {self}; rows must be positive, costs not negative")
        if not all(0 < rate < math.inf for rate in (self.direct, self.widened)):
            raise ValueError(f"stored is {self}; its rates must be positive")

    def few(self, parameters: float, rows: float) -> float:
        """Return the seconds of so few rows times a matrix of `parameters` elements."""
        return parameters / self.direct * (1 + self.more * (max(1.0, rows) - 1))

    def scaled(self, factor: float) -> StoredRates:
        """Return the rates with compute and memory `factor` times as fast."""
        return replace(self, direct=factor * self.direct, widened=factor * self.widened)


def fitted(
    ranks: float,
    rows: Sequence[int],
    small: tuple[float, Sequence[float]],
    large: tuple[float, Sequence[float]],
) -> RowRates:
    """Fit rates to (parameters, seconds by number of rows) of a small layer and of a large one."""
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
    """Return the rates measured nearest to `ranks` computing ranks; None if there are none."""
    return min(measured, key=lambda m: abs(math.log(m.ranks / ranks)), default=None)
