"""Running an entry on all ranks: in this process, in local ones, or in a launcher's world.

Nothing here imports torch before it is needed: a local launch imports it in the process that ranks
are forked from and in this one at the same time.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cptool.distributed.connect import call_entry, connect, take_device
from cptool.distributed.devices import cores, resolve_device, settle_kernels
from cptool.distributed.environment import Seat, launched
from cptool.distributed.failure import RankFailed, describe, is_communication
from cptool.distributed.options import RankOptions
from cptool.distributed.signals import held_back, orderly
from cptool.distributed.status_board import Board
from cptool.distributed.world import World
from cptool.errors import (
    RunError,
    UserError,
    explain,
    is_out_of_memory,
    show_traceback,
)
from cptool.host.scratch import make_folder


def run(
    entry: Callable[..., Any],
    *args: Any,
    ranks: RankOptions | None = None,
    watch: Callable[[Board], None] | None = None,
    own: Sequence[Any] | None = None,
    preload: Iterable[str] = (),
) -> Any:
    """Call entry(world, *args) on the ranks of `ranks`, by default one, and return rank 0's value.

    Under torchrun or srun this process joins that world and returns its own rank's value. Otherwise
    one rank runs in this process, and more are started as local processes
    (`cptool.distributed.local`). Then `entry` must be a function at the top level of a .py file
    that ranks can import, `args` picklable, and a main module that is imported has what it does
    under `if __name__ == "__main__"`. The ranks share this process's standard output and error.

    ranks: how many ranks to run, where and how. Without `threads`, each rank is bound to its share
        of the cores (`cptool.host.affinity`). A timeout below 5 s is raised to 5 s between running
        ranks.
    watch: called with the status board about ten times a second while ranks work (on rank 0).
    own: one last argument per rank that no other rank receives, such as its end of a connection;
        only for ranks that are started here.
    preload: names of modules that `entry` imports once it runs; the process that ranks are forked
        from imports them once for all, if this run is the first to need that process.

    Raises UserError for an entry that ranks cannot import, and the one that a rank raised;
    RankFailed if a rank died or raised anything else (with CPTOOL_TRACEBACK set, its traceback is
    on standard error); once all ranks are ended, KeyboardInterrupt for SIGINT and SystemExit for
    SIGTERM. With one rank, exceptions propagate unchanged, except that RunError replaces those of
    exhausted memory.
    """
    ranks = ranks or RankOptions()
    ranks.check()
    seat = launched()
    if seat is not None and seat.size > 1:
        board = Board(seat.size)
        with _watching(watch if seat.rank == 0 else None, board):
            return _joined(entry, args, seat=seat, ranks=ranks, board=board)
    if ranks.count == 1:
        board = Board(1)
        with _watching(watch, board):
            last = () if own is None else own
            try:
                return entry(_alone(ranks, board), *args, *last)
            except (MemoryError, RuntimeError, OSError) as error:
                if is_out_of_memory(error):
                    raise RunError(explain(error, during=str(board.read(0)))) from error
                raise
    from cptool.distributed.local import launch

    with orderly(), make_folder() as folder:
        board = Board(ranks.count, os.path.join(folder, "status"))
        with _watching(watch, board):
            return launch(
                entry, args, ranks=ranks, board=board, folder=folder, own=own, preload=preload
            )


def _alone(ranks: RankOptions, board: Board) -> World:
    """Return the world whose single rank is this process."""
    device = resolve_device(ranks.device)
    with held_back():
        import torch

    torch.set_num_threads(ranks.threads or cores())
    if device == "cuda":
        settle_kernels(0, tell=True)
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    return World(device=where, board=board)


def _joined(
    entry: Callable[..., Any], args: tuple, *, seat: Seat, ranks: RankOptions, board: Board
) -> Any:
    """Run one rank of a launcher's world, and end the others if this one dies."""
    from cptool.distributed.rendezvous import launchers_address, launchers_store, start_deadline
    from cptool.distributed.stopped import kill_stopped_peers

    def give_up() -> None:
        absence = f"rank {seat.rank} did not meet the others at {launchers_address()}"
        print(f"cptool: {absence} in {ranks.timeout:g} s", file=sys.stderr, flush=True)
        kill_stopped_peers()
        os._exit(1)

    try:
        store = launchers_store(seat, ranks.timeout)
        take_device(seat, ranks)
        with start_deadline(ranks.timeout, give_up):
            world = connect(seat, ranks, board, store, place=f" to {launchers_address()}")
        return call_entry(entry, args, world)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also what is not an Exception, such as a panic in Rust
        if is_communication(error):
            # Last, because the launcher ends this rank too once it sees a rank die.
            atexit.register(kill_stopped_peers)
        else:
            show_traceback(error)
        raise RankFailed(describe(seat.rank, board, error)) from error


@contextlib.contextmanager
def _watching(watch: Callable[[Board], None] | None, board: Board) -> Iterator[None]:
    """Call watch(board) from a thread while the body runs."""
    if watch is None:
        yield
        return
    over = threading.Event()

    def loop() -> None:
        watch(board)
        while not over.wait(0.1):
            watch(board)

    thread = threading.Thread(target=loop, name="cptool-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
