"""Running a turn on ranks, with its progress shown."""

import contextlib
import functools
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from cptool.cli import draw, verbosity
from cptool.cli.progress import drawn_bar
from cptool.cli.progress_lines import Lines
from cptool.distributed import launch
from cptool.distributed.environment import launched_size
from cptool.distributed.options import RankOptions
from cptool.distributed.signals import end_as_requested, stopping
from cptool.distributed.status_board import SAVING, Board
from cptool.engine.rank_modules import rank_modules
from cptool.engine.requests import Connection
from cptool.engine.turn import Report, Turn, run
from cptool.errors import Interrupted
from cptool.units import flop_rate, some

if TYPE_CHECKING:
    from cptool.distributed.world import World
    from cptool.engine.answers.records import Emit


def run_turn(turn: Turn, ranks: RankOptions, *, emit: "Emit | None" = None) -> Report | None:
    """Run the turn and return the report of rank 0; None in the other processes of a launcher.

    emit: called for each token as it is known, in the process that returns the report: this one, or
        rank 0 of a launcher. It may be called from another thread than this one, one call at a
        time. What it raises is raised here, once the turn has ended.

    The first Ctrl-C ends the turn in order, and a second one at once; so does SIGTERM in a turn of
    a session. Answers keep what was said (`check_whole` tells). KeyboardInterrupt, or SystemExit,
    is raised if the prompt was still being read, and says what is kept of it.
    """
    lines = Lines() if verbosity.writes_progress_lines() else None
    with drawn_bar() as bar:
        if emit is not None:
            emit = bar.before(emit)
        with _stopped_by_ctrl_c(bar.watch if lines is None else lines.watch, turn) as watch:
            shared: Any = {"ranks": ranks, "watch": watch, "preload": rank_modules()}
            if emit is None or (launched_size() or 1) > 1 or ranks.count == 1:
                here = _on_rank if emit is None else functools.partial(_on_rank, emit=emit)
                report, rank, kept = launch.run(here, turn, **shared)
            else:
                with _relay(emit) as end:
                    own = [end, *[None] * (ranks.count - 1)]
                    there = _on_local_rank
                    report, rank, kept = launch.run(there, turn, own=own, **shared)
    if rank:
        return None
    if report is None:
        end_as_requested(f"while the prompt was read; {_what_is_kept(turn, kept)}")
    if lines is not None:
        lines.end(report)
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


def check_whole(report: Report, turn: Turn) -> None:
    """Raise KeyboardInterrupt, or SystemExit for SIGTERM, and say what was kept, if that ended the
    turn's answers.
    """
    if "interrupted" in report.stopped:
        count = some(sum(map(len, report.token_ids)), "token")
        kept = "" if turn.session is None else f"; session {turn.session} keeps them"
        end_as_requested(f"after {count}{kept}")


def _what_is_kept(turn: Turn, tokens: int) -> str:
    """Return what is kept of a prompt that was not read to its end, in words."""
    if not tokens:
        found = turn.session is not None and turn.resume is not None
        return f"session {turn.session} is as it was" if found else "nothing was kept"
    whole = some(sum(map(len, turn.prompts)), "token")
    return f"session {turn.session} keeps {tokens:,} of its {whole}; the same command goes on there"


@contextlib.contextmanager
def _stopped_by_ctrl_c(
    show: Callable[[Board], None], turn: Turn
) -> Iterator[Callable[[Board], None]]:
    """Have the first Ctrl-C request the ranks to stop; yield what is to see their board.

    show: called with the board. In a turn of a session, SIGTERM is such a request too.
    """
    boards: list[Board] = []

    def watch(board: Board) -> None:
        if not boards:
            boards.append(board)
        show(board)

    def request() -> bool:
        heard = bool(boards) and boards[0].cancellable
        if heard:
            boards[0].cancel()
        return heard

    def noticed() -> bool:
        return boards[0].noticed or boards[0].read(0).phase == SAVING

    with stopping(request, noticed, terminate=turn.session is not None):
        yield watch


_Outcome = tuple[Report | None, int, int]
"""The report, None if Ctrl-C came while the prompt was read; this rank's number; and how many
tokens of a prompt that was not read to its end the session keeps."""


def _on_rank(world: "World", turn: Turn, emit: "Emit | None" = None) -> _Outcome:
    try:
        return run(world, turn, emit), world.rank, 0
    except Interrupted as interrupted:
        return None, world.rank, interrupted.kept


def _on_local_rank(world: "World", turn: Turn, end: socket.socket | None) -> _Outcome:
    """Run the turn on a rank that is a process of its own; rank 0 sends its tokens to `end`."""
    if end is None:
        return _on_rank(world, turn)
    with Connection(end) as connection:
        return _on_rank(world, turn, lambda *token: connection.send(list(token)))


@contextlib.contextmanager
def _relay(emit: "Emit") -> Iterator[socket.socket]:
    """Yield a socket for rank 0; a thread calls emit for what arrives from it.

    Once the body has ended, all tokens have been emitted. Raises what `emit` raised.
    """
    ours, theirs = socket.socketpair()
    failures: list[BaseException] = []

    def pass_on() -> None:
        with Connection(ours) as connection, contextlib.suppress(EOFError, ConnectionError):
            while True:
                token = connection.receive()
                if not failures:  # otherwise the rank would wait for room
                    try:
                        emit(*token)
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
