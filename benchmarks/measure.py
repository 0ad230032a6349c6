"""For the scripts beside it: how cptool measures, under a short name."""

from cptool.bench.measure import circumstances, clock_name, interleave, stopwatch, summary

__all__ = ["circumstances", "clock_name", "interleave", "stopwatch", "summary"]
