"""Starting and ending the ranks of one machine.

Ranks are forked from a server that has imported torch. A run listens on loopback alone
(`cptool.distributed.rendezvous`), and what a rank is started with, and what it returns, goes
through pipes that it inherits, which no other process can write to. torch's elastic agent, which
torchrun uses, is not used here: its store listens on all interfaces without a password, it
unpickles what it finds there, and it waits 30 s for a stopped rank.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from cptool.distributed import server_process
from cptool.distributed.connect import call_entry, connect, take_device
from cptool.distributed.devices import resolve_device, transport
from cptool.distributed.environment import Seat
from cptool.distributed.failure import RankFailed, describe, is_communication
from cptool.distributed.options import RankOptions
from cptool.distributed.rendezvous import (
    check_loopback,
    file_store,
    listen_on_loopback,
    start_deadline,
)
from cptool.distributed.signals import end_with_parent, held_back
from cptool.distributed.status_board import Board
from cptool.distributed.stopped import is_stopped
from cptool.distributed.supervision import ENDED, Supervision
from cptool.errors import UserError, show_traceback

RANK_NAME = "cptool-rank-"
"""Prefix of the names of the processes that are ranks."""

# How long ranks may take to end in order after SIGTERM, which a stopped rank does not handle.
_ORDERLY_S = 2.0
# How long killed ranks may take: a process that waits for a disk ends only when the disk responds.
_KILLED_S = 2.0


def launch(
    entry: Callable[..., Any],
    args: tuple,
    *,
    ranks: RankOptions,
    board: Board,
    folder: str,
    own: Sequence[Any] | None = None,
    preload: Iterable[str] = (),
) -> Any:
    """Call entry(world, *args) on local processes and return rank 0's value.

    Fulfils the contract of `cptool.distributed.launch.run`; if ranks fail, raises the first cause.

    board: the status board, in a file of `folder`.
    folder: a private folder in which the ranks meet.
    own: one last argument per rank.
    preload: modules that the process that ranks are forked from imports.
    """
    server_process.end_if_unguarded()
    server_process.check_importable(entry)
    check_loopback()
    server_process.start(entry, preload)
    ranks = replace(ranks, device=resolve_device(ranks.device, board.ranks))
    transport(ranks.device, board.ranks, ranks.transport)  # raises before any rank starts

    context = multiprocessing.get_context("forkserver")
    receiver, answer = context.Pipe(duplex=False)
    started: list[BaseProcess] = []
    supervision: Supervision | None = None
    try:
        with held_back(), start_deadline(ranks.timeout, server_process.kill_if_stopped):
            for rank in range(board.ranks):
                seat = Seat(rank, board.ranks, rank, board.ranks)
                given = args if own is None else (*args, own[rank])
                to = answer if rank == 0 else None
                process = context.Process(
                    target=_rank_main,
                    args=(seat, entry, given),
                    kwargs={
                        "ranks": ranks,
                        "path": str(board.path),
                        "folder": folder,
                        "answer": to,
                    },
                    name=f"{RANK_NAME}{rank}",
                    daemon=True,
                )
                with server_process.without_main_module(entry):
                    process.start()
                started.append(process)
            answer.close()
        supervision = Supervision(started, receiver, board, timeout=ranks.timeout)
        return supervision.result()
    except FileNotFoundError:  # the server's socket is gone
        raise RankFailed(f"{server_process.folder()} was removed while the run used it") from None
    except EOFError:
        raise RankFailed(
            f"{server_process.described()} was stopped or has ended; {ENDED}"
        ) from None
    finally:
        _end(started)
        if supervision is not None:
            supervision.join()


def _rank_main(
    seat: Seat,
    entry: Callable[..., Any],
    args: tuple,
    *,
    ranks: RankOptions,
    path: str,
    folder: str,
    answer: Connection | None,
) -> None:
    """Connect a local rank and call `entry`; record an exception on the board, and end.

    path: the file of the status board.
    answer: the connection by which rank 0 sends what `entry` returned; None on other ranks.
    """
    _die_with_launcher()
    for name, value in (
        ("RANK", seat.rank),
        ("WORLD_SIZE", seat.size),
        ("LOCAL_RANK", seat.local_rank),
        ("LOCAL_WORLD_SIZE", seat.local_size),
    ):
        os.environ[name] = str(value)
    try:
        board = Board(seat.size, path, make=False)
        store = file_store(folder, seat.size)
    except FileNotFoundError:  # the launching process is ending, and has removed its folder
        os._exit(1)
    # Ctrl-C reaches every process of the terminal, and the launching process reports it. Python's
    # own handler would never run in a rank that is blocked in a transfer.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # see `fork_server`
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see `server_process`
    listen_on_loopback()

    def give_up() -> None:
        board.fail(seat.rank, "communication", f"rank {seat.rank} did not meet the others")
        os._exit(1)

    try:
        take_device(seat, ranks)
        with start_deadline(ranks.timeout, give_up):
            world = connect(seat, ranks, board, store)
        value = call_entry(entry, args, world)
        if answer is not None:
            # Not by `send`: torch would share a tensor's memory, which ends with this process.
            answer.send_bytes(pickle.dumps(value))
        return
    except (KeyboardInterrupt, SystemExit):
        raise
    except UserError as error:
        board.fail(seat.rank, "user", str(error))
    except BaseException as error:  # also what is not an Exception, such as a panic in Rust
        kind = "communication" if is_communication(error) else "error"
        board.fail(seat.rank, kind, describe(seat.rank, board, error))
        if kind == "error":
            show_traceback(error)
    with contextlib.suppress(OSError, AttributeError):  # never opened, or full
        sys.stdout.flush()
        sys.stderr.flush()
    # Not sys.exit: an orderly exit would wait for groups whose other ranks are stuck.
    os._exit(1)


def _end(ranks: Sequence[BaseProcess]) -> None:
    """End the ranks that still run: by SIGTERM, and by SIGKILL if they do not end in time."""
    server_process.kill_if_stopped()
    running = [process for process in ranks if process.is_alive()]
    for process in running:
        process.terminate()
    until = time.monotonic() + _ORDERLY_S
    for process in running:
        process.join(0.0 if is_stopped(process.pid) else max(0.0, until - time.monotonic()))
    running = [process for process in running if process.is_alive()]
    for process in running:
        process.kill()
    until = time.monotonic() + _KILLED_S
    for process in running:
        process.join(max(0.0, until - time.monotonic()))


def _die_with_launcher() -> None:
    """Have this process end when the launching process ends, however that ends.

    The kernel kills it when its parent ends, the fork server, which itself ends with the launching
    process (`cptool.distributed.fork_server`). That ends even a stopped rank. A thread watches the
    launching process too, because a server that was started outside the main thread lives as long
    as its ranks do.
    """
    end_with_parent()
    launcher = multiprocessing.parent_process()
    assert launcher is not None  # ranks are started by multiprocessing

    def watch() -> None:
        launcher.join()
        os._exit(1)

    threading.Thread(target=watch, name="cptool-launcher", daemon=True).start()
