"""The process that local ranks are forked from: its start, its socket, its end.

It has imported torch and started no thread of ours, so that ranks are up in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from multiprocessing import forkserver, resource_tracker, util
from typing import Any

from cptool.distributed.stopped import is_stopped
from cptool.errors import UserError
from cptool.host.scratch import Folder, make_folder, others_can_replace

# Longest temporary directory with room for the name of the server's socket (107 bytes in all).
_LONGEST_BASE = 55


def start(entry: Callable[..., Any]) -> None:
    """Start what ranks that call `entry` are forked from, if it does not run yet.

    It has imported torch and started no thread of ours: four ranks are up in 0.3 s, against 3 to
    5 s when each imports torch by itself. It imports while this process does. `launch` starts it
    too. It hears no Ctrl-C.
    """
    # Until 3.10.8 and 3.11.0 Python gave the server's socket a name in no directory, to which any
    # user of the machine could connect and have code run (CVE-2022-42919).
    util.abstract_sockets_supported = False  # type: ignore[misc]  # final, and no other way
    _choose_folder()
    modules = ["torch.distributed", entry.__module__]
    # The end that it is tied to is that of the thread that starts it.
    if threading.current_thread() is threading.main_thread():
        modules.insert(0, "cptool.distributed.fork_server")
    forkserver.set_forkserver_preload(modules)
    with _deaf():
        forkserver.ensure_running()


_folder: Folder | None = None


def folder() -> str:
    """The private folder of the server's socket; `start` has made it."""
    assert _folder is not None
    return _folder.name


def _choose_folder() -> None:
    """Have the server's socket in a private folder that goes with this process, or is swept after
    it, and whose path is short enough for a socket.
    """
    global _folder
    if _folder is not None:
        return
    bases = [tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/dev/shm"]
    fitting = [b for b in bases if b and len(os.fsencode(b)) <= _LONGEST_BASE]
    usable = [b for b in fitting if os.access(b, os.W_OK | os.X_OK)]
    safe = [b for b in usable if not others_can_replace(b)]
    base = next(iter(safe or usable), None)
    if base is None:
        raise UserError(
            f"the temporary directory {bases[0]} has too long a name for a socket; set TMPDIR to "
            f"one of at most {_LONGEST_BASE} characters"
        )
    _folder = make_folder(base)
    util.Finalize(None, _folder.cleanup, exitpriority=-100)  # after all of its users
    # Else multiprocessing makes a folder of its own, with a traceback if that is gone at exit.
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # private
    config["tempdir"] = _folder.name


def pid() -> int:
    """The process that ranks are forked from, which must be running."""
    return forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]  # private


def described() -> str:
    return f"the process that ranks are forked from (pid {pid()})"


def ends_within(seconds: float) -> bool:
    until = time.monotonic() + seconds  # its pipes are closed a moment before it has ended
    try:
        while not os.waitid(os.P_PID, pid(), os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
    except ChildProcessError:  # somebody has waited for it
        pass
    return True


def kill_if_stopped() -> None:
    """Kill it, and its ranks with it, if it is stopped: it hears nothing else."""
    if is_stopped(pid()):
        os.kill(pid(), signal.SIGKILL)


@contextlib.contextmanager
def without_main_module(entry: Callable[..., Any]) -> Iterator[None]:
    """Have a process that starts within not import this one's main module, if `entry` is cptool's.

    multiprocessing imports it for the sake of what is pickled by its name, which is nothing then.
    So a script needs no `if __name__ == "__main__"` to use ranks.
    """
    main = sys.modules["__main__"]
    if entry.__module__.partition(".")[0] != __name__.partition(".")[0]:
        yield
        return
    spec = getattr(main, "__spec__", None)
    main.__spec__ = ModuleSpec("__main__", None)  # under this name nothing is imported
    try:
        yield
    finally:
        main.__spec__ = spec


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Block Ctrl-C, which then waits, and so has a process that is started here blocked from its
    beginning.

    It reaches every process of the terminal, and the fork server, which ignores it once it serves,
    would tell of it while it still imports.
    """
    resource_tracker.ensure_running()  # as the server would; starting it unblocks
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
