"""How many tokens are worth drafting: what a step of more rows takes, and how often drafts come
true, both as measured so far.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from cptool.engine.drafts.lookup import LONGEST

_LEAST_GAIN = 1.02
"""Tokens per second that a draft must promise, relative to those of the step without it."""


class StepTime:
    """Seconds of a step by its rows: a + b (rows - 1), of which both follow the measured steps.

    A step of a few rows takes little longer than one of a single row where reading the weights is
    what takes time, and nearly as many times as long where multiplying is.
    """

    def __init__(self) -> None:
        self.one = 0.0
        self.slope = 0.25  # of each further row, relative to a step of one; a guess that is tried

    def record(self, rows: int, seconds: float) -> None:
        """Take a measured step into account. One that was disturbed counts as twice as long as
        expected at most.
        """
        if not self.one:
            self.one = seconds / (1 + self.slope * (rows - 1))
            return
        expected = self.one * (1 + self.slope * (rows - 1))
        seconds = min(max(seconds, expected / 2), 2 * expected)
        if rows == 1:
            self.one += 0.2 * (seconds - self.one)
            return
        self.one += 0.05 * self.one * (seconds / expected - 1)
        measured = (seconds / self.one - 1) / (rows - 1)
        self.slope = max(0.0, self.slope + 0.2 * (measured - self.slope))

    def relative(self, rows: int) -> float:
        """Return how many times as long a step of `rows` takes as one of a single row."""
        return 1 + self.slope * (rows - 1)


_LENGTHS = 3, 4, 6, 10, LONGEST + 1
_PRIORS = 0.2, 0.35, 0.6, 0.8, 0.9
"""Part of the drafts that come true at first, by the length of their match: below 3, 4, ..."""

_WEIGHT, _KEEP = 3.0, 0.97
"""How many drafts a prior counts as; how much of the past counts with each new one."""


class Acceptance:
    """How often a draft comes true, by how many tokens before it were found together."""

    def __init__(self) -> None:
        self._true = [_WEIGHT * prior for prior in _PRIORS]
        self._all = [_WEIGHT] * len(_PRIORS)

    @staticmethod
    def kind(length: int) -> int:
        """Return the class of a match of `length` tokens."""
        return next(n for n, most in enumerate(_LENGTHS) if length < most)

    def record(self, kind: int, *, true: bool) -> None:
        """Count a draft that came true, or did not."""
        self._true[kind] = _KEEP * self._true[kind] + true
        self._all[kind] = _KEEP * self._all[kind] + 1

    def chance(self, kind: int) -> float:
        """Return how probable it is that a draft of this class comes true after those before it."""
        return self._true[kind] / self._all[kind]


def worthwhile(
    chances: Mapping[int, float], most: Mapping[int, int], rows: int, times: StepTime, *, room: int
) -> dict[int, int]:
    """Return how many tokens to draft for each sequence, so that tokens per second are the most.

    chances[b]: that a draft of sequence b comes true after those before it. most[b]: its drafts at
    most. rows: of the step without drafts; room: those that drafts may add.

    A draft is worth the chance that all up to it come true, a token each; drafts are taken in the
    order of their worth as long as tokens grow faster than time.
    """
    counts = dict.fromkeys(chances, 0)
    tokens, added = float(rows), 0
    worth = [(-chance, b) for b, chance in chances.items() if most[b] > 0]
    heapq.heapify(worth)
    while worth and added < room:
        gain, b = -worth[0][0], worth[0][1]
        grown = (tokens + gain) / tokens
        slower = times.relative(rows + added + 1) / times.relative(rows + added)
        if grown < slower * (_LEAST_GAIN if added == 0 else 1.0):
            break
        tokens, added = tokens + gain, added + 1
        counts[b] += 1
        if counts[b] < most[b]:
            heapq.heapreplace(worth, (-gain * chances[b], b))
        else:
            heapq.heappop(worth)
    return counts
