"""How many ranks and threads a run may have, and how long it waits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cptool.distributed.environment import launched_size
from cptool.errors import OptionError, UserError

if TYPE_CHECKING:
    pass

DEFAULT_TIMEOUT_S = 300.0
# More on one machine is not what anybody means; they are processes, each with a connection to all.
MOST_LOCAL_RANKS = 128
# OpenMP ends the process, without a word of ours, where it cannot start as many as it is told.
MOST_THREADS = 1024


def check_size(cp: int, tp: int) -> None:
    """UserError unless cp and tp are at least 1 and fill the launcher's world, if there is one, or
    are few enough for the ranks to be started here.
    """
    for name, value in (("cp", cp), ("tp", tp)):
        if value < 1:
            raise OptionError(name, value, "it must be at least 1", "leave it out for one rank")
    launched = launched_size()
    if launched is not None and cp * tp != launched:
        raise UserError(
            f"`cp` {cp} and `tp` {tp} make {cp * tp} ranks, the launcher started {launched}; "
            "give it as many processes, or other `cp` and `tp`"
        )
    if launched is None and cp * tp > MOST_LOCAL_RANKS:
        raise UserError(
            f"`cp` {cp} and `tp` {tp} make {cp * tp} ranks, one command starts at most "
            f"{MOST_LOCAL_RANKS}; use fewer, or torchrun on several machines"
        )


def check_threads(threads: int | None) -> None:
    """UserError for more threads than a rank can have."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise OptionError(
            "threads",
            threads,
            f"it must be 1 to {MOST_THREADS}",
            "leave it out for this rank's share of the cores",
        )


def check_limits(threads: int | None, timeout: float) -> None:
    """UserError for more threads than a rank can have, or a time to wait that is none."""
    check_threads(threads)
    if not 0 < timeout < math.inf:
        raise OptionError("timeout", timeout, "it must be a positive number of seconds")


@dataclass(frozen=True)
class Ranks:
    """How many ranks to run, where, and how."""

    cp: int
    tp: int
    device: str
    threads: int | None
    timeout: float
