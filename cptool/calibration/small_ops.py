"""Measuring small ops around products and attention: copies, reordering, positions."""

from __future__ import annotations

import torch

from cptool.calibration.clock import Clock
from cptool.sharding import balanced, union


def small_op(clock: Clock) -> float:
    """Return the seconds to copy a few bytes."""
    few = torch.zeros(64, device=clock.device)
    return clock(few.clone, calls=64)


def touch(clock: Clock) -> float:
    """Return the B/s, read and written, of repeatedly reordering rows of a message's size."""
    rows, width = 4096, 256
    given = torch.zeros(rows, width, device=clock.device)
    order = torch.arange(rows, device=clock.device).view(8, -1).T.flatten()
    made = torch.empty_like(given)
    return 2 * given.nbytes / clock(lambda: torch.index_select(given, 0, order, out=made), calls=4)


def positions(clock: Clock) -> float:
    """Return the seconds per key to put the positions that four ranks hold in order."""
    tokens = 16384
    layout = balanced([tokens], 4)
    placements = [placement.to(clock.device) for placement in layout.placements()]
    return clock(lambda: union(placements)) / tokens
