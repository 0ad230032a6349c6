"""Sets of moments as intervals: their union, difference and length."""

from __future__ import annotations

from collections.abc import Sequence

Interval = tuple[float, float]


def union(intervals: Sequence[Interval]) -> list[Interval]:
    """Return the same moments as disjoint intervals, ascending."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def subtract(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """Return the moments of `first` that are not in `second`."""
    rest, second = [], union(second)
    at = 0
    for begin, end in union(first):
        while at < len(second) and second[at][1] <= begin:
            at += 1
        following = at
        while following < len(second) and second[following][0] < end:
            if begin < second[following][0]:
                rest.append((begin, second[following][0]))
            begin = second[following][1]
            following += 1
        if begin < end:
            rest.append((begin, end))
    return rest


def length_s(intervals: Sequence[Interval]) -> float:
    """Return the seconds of disjoint intervals."""
    return sum(end - begin for begin, end in intervals)


def overlap_s(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """Return the seconds that lie in both."""
    return length_s(union(first)) - length_s(subtract(first, second))
