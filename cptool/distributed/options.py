"""The options of a run's ranks, and their limits."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

from cptool.distributed.environment import launched_size
from cptool.errors import OptionError, UserError

DEFAULT_TIMEOUT_S = 300.0
# More on one machine are a mistake: ranks are processes, each connected to all others.
MOST_LOCAL_RANKS = 128
# OpenMP aborts the process, without an error of ours, if it cannot start the requested threads.
MOST_THREADS = 1024


def _transport() -> str:
    return os.environ.get("CPTOOL_TRANSPORT") or "auto"


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """How many ranks to run, where, and how.

    cp, tp: context-parallel ranks, and tensor-parallel ranks per context-parallel rank.
    device: "auto", "cpu" or "cuda".
    threads: intra-op threads per rank; by default the machine's cores divided among its ranks.
    timeout: seconds that a rank waits for the others in one transfer before it gives up.
    transport: "auto", "direct" or "staged", see `cptool.distributed.devices.transport`; by default
        CPTOOL_TRANSPORT of the process that makes this object, because the process that local ranks
        are forked from may have started with another value.
    """

    cp: int = 1
    tp: int = 1
    device: str = "auto"
    threads: int | None = None
    timeout: float = DEFAULT_TIMEOUT_S
    transport: str = field(default_factory=_transport)

    @property
    def count(self) -> int:
        """The total number of ranks."""
        return self.cp * self.tp

    def check(self) -> None:
        """Raise UserError for an impossible number of ranks or threads or an impossible timeout."""
        check_size(self.cp, self.tp)
        check_limits(self.threads, self.timeout)


def check_size(cp: int, tp: int) -> None:
    """Raise UserError unless cp and tp are at least 1 and their product is right.

    Under a launcher, cp * tp must be the size of its world; otherwise at most MOST_LOCAL_RANKS.
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
    """Raise UserError for more threads than a rank can have."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise OptionError(
            "threads",
            threads,
            f"it must be 1 to {MOST_THREADS}",
            "leave it out for this rank's share of the cores",
        )


def check_limits(threads: int | None, timeout: float) -> None:
    """Raise UserError for more threads than a rank can have, or a timeout that is not positive and
    finite.
    """
    check_threads(threads)
    if not 0 < timeout < math.inf:
        raise OptionError("timeout", timeout, "it must be a positive number of seconds")
