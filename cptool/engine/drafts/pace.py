"""How many tokens are worth drafting: what a step of more rows takes, and how often drafts come
true, both as measured so far.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

_LEAST_GAIN = 1.02
"""Tokens per second that a draft must promise, relative to those of the step without it."""

_SLOPE = 0.25
"""What a further row takes, relative to a step of one, before it is measured: a guess that is
tried.
"""

_PATIENCE = 8
"""Steps of one row after which that guess slowly takes the place of what was measured."""


class StepTime:
    """Seconds of a step by its rows: a + b (rows - 1), of which both follow the measured steps.

    A step of a few rows takes little longer than one of a single row where reading the weights is
    what takes time, and nearly as many times as long where multiplying is.
    """

    def __init__(self) -> None:
        self.one = 0.0
        self.slope = _SLOPE  # of each further row, relative to a step of one
        self._alone = 0

    def record(self, rows: int, seconds: float) -> None:
        """Take a measured step into account. One that was disturbed counts as twice as long as
        expected at most.
        """
        if not self.one:
            self.one = seconds / (1 + self.slope * (rows - 1))
            return
        expected = self.one * (1 + self.slope * (rows - 1))
        seconds = min(max(seconds, expected / 2), 2 * expected)
        self._alone = self._alone + 1 if rows == 1 else 0
        if rows == 1:
            self.one += 0.2 * (seconds - self.one)
            if self._alone > _PATIENCE:
                # Nothing else corrects it where a disturbance has made it too large for drafts.
                self.slope -= 0.05 * max(0.0, self.slope - _SLOPE)
            return
        self.one += 0.05 * self.one * (seconds / expected - 1)
        measured = (seconds / self.one - 1) / (rows - 1)
        certain = 0.05 * min(rows - 1, 4)  # a step of more rows says more of each
        self.slope = max(0.0, self.slope + certain * (measured - self.slope))

    def relative(self, rows: int) -> float:
        """Return how many times as long a step of `rows` takes as one of a single row."""
        return 1 + self.slope * (rows - 1)


_WEIGHT, _KEEP = 3.0, 0.97
"""How many drafts a prior counts as; how much of the past counts with each new one."""

_FORGET = 0.98
"""How much of what was found counts after each step for which nothing is drafted."""


class Acceptance:
    """How often a draft comes true, by its kind, such as how sure its source is of it.

    priors: part of the drafts of each kind that come true at first.
    """

    def __init__(self, priors: Sequence[float]) -> None:
        self._priors = [_WEIGHT * prior for prior in priors]
        self._true = list(self._priors)
        self._all = [_WEIGHT] * len(self._priors)

    def record(self, kind: int, *, true: bool) -> None:
        """Count a draft that came true, or did not."""
        self._true[kind] = _KEEP * self._true[kind] + true
        self._all[kind] = _KEEP * self._all[kind] + 1

    def chance(self, kind: int) -> float:
        """Return how probable it is that a draft of this kind comes true after those before it."""
        return self._true[kind] / self._all[kind]

    def relax(self) -> None:
        """Return a little towards the priors, as a text may have changed since the last draft."""
        for kind, prior in enumerate(self._priors):
            self._true[kind] = prior + _FORGET * (self._true[kind] - prior)
            self._all[kind] = _WEIGHT + _FORGET * (self._all[kind] - _WEIGHT)


class Budget:
    """The drafts of a step of `rows` sequences, which are taken as long as each makes tokens per
    second grow.

    room: drafts at most.
    """

    def __init__(self, rows: int, times: StepTime, *, room: int) -> None:
        self._tokens, self._rows, self._first, self._room = float(rows), rows, True, room
        self._times = times

    def pays(self, chance: float) -> bool:
        """Return whether one more draft pays that comes true with this probability."""
        if self._room < 1:
            return False
        grown = (self._tokens + chance) / self._tokens
        slower = self._times.relative(self._rows + 1) / self._times.relative(self._rows)
        return grown >= slower * (_LEAST_GAIN if self._first else 1.0)

    def take(self, chance: float) -> bool:
        """Take such a draft if it pays, and return whether it does."""
        if not self.pays(chance):
            return False
        self._tokens += chance
        self._rows, self._room, self._first = self._rows + 1, self._room - 1, False
        return True


_FIRST, _AGAIN, _AGED = 4.0, 0.5, 0.95
"""How many drafts a prior counts as at first and when drafting is tried again; how much of the past
counts with each further step.
"""

_WAIT, _LONGEST_WAIT = 8, 64
"""Steps without drafts until they are tried again: at first, and at most."""


class Worth:
    """Whether drafts pay whose kind is known only once they are computed.

    What decides is the part of all computed drafts that came true: the others, checked or not, took
    time for nothing. Where that part is too small, drafts are tried again from time to time, as a
    text may change.

    prior: that part at first.
    """

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self._true, self._all = _FIRST * prior, _FIRST
        self._wait = self._left = _WAIT

    def record(self, computed: int, true: int) -> None:
        """Count the drafts of a step, of which `true` came true."""
        self._true = _AGED * self._true + true
        self._all = _AGED * self._all + computed
        if true:
            self._wait = self._left = _WAIT

    def pays(self, budget: Budget) -> bool:
        """Return whether to compute drafts in the step of this budget."""
        if budget.pays(self._true / self._all):
            return True
        if not budget.pays(self._prior):
            return False
        self._left -= 1
        if self._left > 0:
            return False
        self._wait = self._left = min(2 * self._wait, _LONGEST_WAIT)
        self._true, self._all = _AGAIN * self._prior, _AGAIN
        return True


def worthwhile(
    chances: Mapping[int, float], most: Mapping[int, int], budget: Budget
) -> dict[int, int]:
    """Return how many tokens to draft for each sequence, so that tokens per second are the most.

    chances[b]: that a draft of sequence b comes true after those before it. most[b]: its drafts at
    most.

    A draft is worth the chance that all up to it come true, a token each; drafts are taken in the
    order of their worth as long as tokens grow faster than time.
    """
    counts = dict.fromkeys(chances, 0)
    worth = [(-chance, b) for b, chance in chances.items() if most[b] > 0]
    heapq.heapify(worth)
    while worth:
        gain, b = -worth[0][0], worth[0][1]
        if not budget.take(gain):
            break
        counts[b] += 1
        if counts[b] < most[b]:
            heapq.heapreplace(worth, (-gain * chances[b], b))
        else:
            heapq.heappop(worth)
    return counts
