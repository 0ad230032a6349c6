"""Timing what ranks do at the same time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from cptool.distributed.world import World
from cptool.host import contention


class Log:
    """Counts the measurements of a calibration, for the progress bar, and collects how much their
    repeats spread.

    total: the measurements to come, 0 if that is unknown.
    """

    def __init__(self, world: World, total: int = 0) -> None:
        self.world, self.total, self.begun = world, total, 0
        self.spreads: list[float] = []

    def begin(self) -> None:
        """Report that the next measurement begins."""
        self.world.report("calibrate, measurement", self.begun, self.total)
        self.begun += 1

    @property
    def spread(self) -> float | None:
        """The median of the spreads of all timings on this rank; None before any."""
        return statistics.median(self.spreads) if self.spreads else None


def spread_of(times: list[float]) -> float:
    """Return the range of the middle half of at least two times, over their median."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


class Clock:
    """Times work that the ranks of `part` do at the same time while the rest of `world` waits."""

    def __init__(
        self, world: World, part: World | None, repeats: int, log: Log | None = None
    ) -> None:
        self.world, self.part, self.repeats = world, part, repeats
        self.log = log or Log(world)
        self.device = world.device

    def __call__(self, work: Callable[[], object], calls: int = 1) -> float:
        """Return the seconds per call of `work`, run `calls` times in a row."""
        return self.all({"": work}, calls)[""]

    def all(self, works: Mapping[str, Callable[[], object]], calls: int = 1) -> dict[str, float]:
        """Return the seconds per call of each of `works`, interleaved: drift affects all alike.

        Each is the median over the repeats on the slowest rank. Collective over `world`.
        """
        self.log.begin()
        spent: dict[str, list[float]] = {name: [] for name in works}
        for repeat in range(self.repeats + 1):
            for name, work in works.items():
                self.world.barrier()
                if self.part is None:
                    continue
                took = self._time(work, calls)
                if repeat:  # the first one warms up
                    spent[name].append(took / calls)
        self.log.spreads += [spread_of(times) for times in spent.values() if len(times) > 1]
        middle = {name: statistics.median(times) if times else 0.0 for name, times in spent.items()}
        return {name: max(found[name] for found in self.world.gather(middle)) for name in works}

    def _time(self, work: Callable[[], object], calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def slope(low: tuple[float, float], high: tuple[float, float]) -> float:
    """Return units per second from (units, seconds) of a small and a large run.

    Fixed costs cancel in the difference.
    """
    seconds = max(high[1] - low[1], 0.05 * high[1])
    return (high[0] - low[0]) / seconds


class ComputeClock(Clock):
    """Times work in which ranks compute and wait for nothing: without the time for which other
    programs had their processors.
    """

    def _time(self, work: Callable[[], object], calls: int) -> float:
        before, began = contention.waits(), time.thread_time()
        spent = super()._time(work, calls)
        # Threads that have no part in the work may have waited longer than it took.
        return max(time.thread_time() - began, spent - contention.longest_since(before))
