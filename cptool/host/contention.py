"""How long threads of this process wait for processors that other threads have.

Linux counts it for each thread (`/proc/*/schedstat`): the time for which the thread was ready to
run and did not. On a machine that others use too, it says why a run takes longer than predicted.
"""

import os

Waits = dict[str, int]
"""Nanoseconds that each thread has waited so far, by its number."""


def waits() -> Waits:
    """Return how long each thread of this process has waited; empty where that is not counted."""
    found = {}
    try:
        for thread in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{thread}/schedstat") as file:
                found[thread] = int(file.read().split()[1])
    except (OSError, ValueError, IndexError):  # a thread has just ended, or nothing is counted
        pass
    return found


def longest_since(before: Waits) -> float:
    """Return the seconds that the thread which waited most has waited since `before`.

    The threads of a rank compute the same step together, so that the slowest holds up all.
    """
    since = (ns - before.get(thread, 0) for thread, ns in waits().items())
    return max(since, default=0) / 1e9
