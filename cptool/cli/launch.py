"""Running a turn on ranks, with its progress shown."""

import contextlib
import functools
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cptool.cli import draw
from cptool.cli.progress import drawn_bar
from cptool.distributed import launch
from cptool.distributed.environment import launched_size
from cptool.distributed.options import RankOptions
from cptool.engine.requests import Connection
from cptool.engine.turn import Report, Turn, run
from cptool.units import flop_rate

if TYPE_CHECKING:
    from cptool.distributed.world import World

Emit = Callable[[int, int], None]


def run_turn(turn: Turn, ranks: RankOptions, *, emit: Emit | None = None) -> Report | None:
    """Run the turn and return the report of rank 0; None in the other processes of a launcher.

    emit: called as emit(sequence, token) for each token as it is known, in the process that
        returns the report: this one, or rank 0 of a launcher. It may be called from another thread
        than this one, one call at a time. What it raises is raised here, once the turn has ended.
    """
    with drawn_bar() as bar:
        if emit is not None:
            emit = bar.before(emit)
        watch = None if bar.hidden else bar.watch
        if emit is None or (launched_size() or 1) > 1 or ranks.count == 1:
            entry = functools.partial(_on_rank, emit=emit) if emit is not None else _on_rank
            report, rank = launch.run(entry, turn, ranks=ranks, watch=watch)
        else:
            with _relay(emit) as end:
                own = [end, *[None] * (ranks.count - 1)]
                report, rank = launch.run(_on_local_rank, turn, own=own, ranks=ranks, watch=watch)
    if rank:
        return None
    rate = report.flops / report.ttft_s / (report.cp * report.tp)
    if report.ceiling_flops is not None and rate > report.ceiling_flops:
        # Ranks that attend to their own tokens alone have such rates.
        draw.say(
            f"{flop_rate(rate)} per rank is more than this hardware can do "
            f"({flop_rate(report.ceiling_flops)}): something was not computed; check with: "
            "cptool verify MODEL",
            always=True,
        )
    return report


def _on_rank(world: "World", turn: Turn, emit: Emit | None = None) -> tuple[Report, int]:
    return run(world, turn, emit), world.rank


def _on_local_rank(world: "World", turn: Turn, end: socket.socket | None) -> tuple[Report, int]:
    """Run the turn on a rank that is a process of its own; rank 0 sends its tokens to `end`."""
    if end is None:
        return _on_rank(world, turn)
    with Connection(end) as connection:
        return _on_rank(world, turn, lambda sequence, token: connection.send([sequence, token]))


@contextlib.contextmanager
def _relay(emit: Emit) -> Iterator[socket.socket]:
    """Yield a socket for rank 0; a thread calls emit(sequence, token) for what arrives from it.

    Once the body has ended, all tokens have been emitted. Raises what `emit` raised.
    """
    ours, theirs = socket.socketpair()
    failures: list[BaseException] = []

    def pass_on() -> None:
        with Connection(ours) as connection, contextlib.suppress(EOFError, ConnectionError):
            while True:
                sequence, token = connection.receive()
                if not failures:  # otherwise the rank would wait for room
                    try:
                        emit(sequence, token)
                    except BaseException as failure:
                        failures.append(failure)

    thread = threading.Thread(target=pass_on, name="cptool-tokens", daemon=True)
    thread.start()
    try:
        yield theirs
    finally:
        theirs.close()  # the rank's copy ends with the rank, and with both the thread
        thread.join()
    if failures:
        raise failures[0]
