"""The process that local ranks are forked from: its start, its socket, its end.

It has imported torch and started no thread of ours, so that ranks are up in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import ModuleSpec
from multiprocessing import forkserver, resource_tracker, util
from types import ModuleType
from typing import Any

from cptool.distributed.stopped import is_stopped
from cptool.errors import UserError
from cptool.host.scratch import Folder, make_folder, others_can_replace

# Longest temporary directory with room for the name of the server's socket (107 bytes in all).
_LONGEST_BASE = 55
_KILLED_S = 2.0


def start(entry: Callable[..., Any], preload: Iterable[str] = ()) -> None:
    """Start the process that ranks which call `entry` are forked from, if it does not run yet.

    It has imported torch and started no thread of ours: four ranks are up in 0.3 s, against 3 to
    5 s when each imports torch by itself. It imports while this process does. `launch` starts it
    too. It ignores Ctrl-C.

    preload: names of further modules that it imports once, instead of every rank.
    """
    # Before 3.10.8 and 3.11.0 Python gave the server's socket a name outside any directory, to
    # which any user of the machine could connect and have code run (CVE-2022-42919).
    util.abstract_sockets_supported = False  # type: ignore[misc]  # final, and no other way
    _choose_folder()
    modules = ["torch.distributed"]
    if entry.__module__ != "__main__":  # which each rank imports, as a module of another name
        modules.append(entry.__module__)
    modules.extend(preload)
    # The server ends with the thread that starts it, so only the main thread may tie it to itself.
    if threading.current_thread() is threading.main_thread():
        modules.insert(0, "cptool.distributed.fork_server")
    forkserver.set_forkserver_preload(modules)
    with interrupts_blocked():
        forkserver.ensure_running()


_folder: Folder | None = None


def folder() -> str:
    """Return the private folder of the server's socket, which `start` has made."""
    assert _folder is not None
    return _folder.name


def _choose_folder() -> None:
    """Choose a private folder for the server's socket, with a path that is short enough for it.

    It is removed when this process ends, or by the next run if this process is killed.
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
    # Otherwise multiprocessing makes a folder of its own, with a traceback if that is gone at exit.
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # private
    config["tempdir"] = _folder.name


def pid() -> int:
    """Return the pid of the process that ranks are forked from, which must be running."""
    return forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]  # private


def described() -> str:
    """Return how messages name the process that ranks are forked from."""
    return f"the process that ranks are forked from (pid {pid()})"


def ends_within(seconds: float) -> bool:
    """Whether the process that ranks are forked from ends within `seconds`. Blocks as long."""
    until = time.monotonic() + seconds  # its pipes are closed a moment before it has ended
    try:
        while not os.waitid(os.P_PID, pid(), os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
    except ChildProcessError:  # it has been waited for elsewhere
        pass
    return True


def kill_if_stopped() -> None:
    """Kill the process that ranks are forked from, and thereby its ranks, if it is stopped.

    A stopped process handles no other signal. Blocks until it has ended, for up to _KILLED_S, or
    the next run would take it for a running one.
    """
    if is_stopped(pid()):
        os.kill(pid(), signal.SIGKILL)
        ends_within(_KILLED_S)


UNGUARDED = 76
"""Exit code of a rank that would start ranks itself, while it imports the main module."""


def check_importable(entry: Callable[..., Any]) -> None:
    """Raise UserError unless processes of their own can import `entry` by its name."""
    name, module = entry.__qualname__, sys.modules.get(entry.__module__)
    try:
        found = functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        found = None
    if found is not entry:
        raise UserError(
            f"{name} cannot be imported by ranks, which are processes of their own; define it at "
            "the top level of a .py file"
        )
    if entry.__module__ == "__main__" and not _has_file(module):
        raise UserError(
            f"{name} is defined in a notebook, at a prompt or in standard input, from where ranks "
            "cannot import it; put it into a .py file and import it from there"
        )


def _has_file(module: ModuleType | None) -> bool:
    return os.path.isfile(getattr(module, "__file__", None) or "")


def end_if_unguarded() -> None:
    """End this process if it is a rank that is still importing the main module, which starts ranks
    wherever it is imported.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(UNGUARDED)


@contextlib.contextmanager
def without_main_module(entry: Callable[..., Any]) -> Iterator[None]:
    """Keep processes that the body starts from importing this one's main module, if that has no
    file or `entry` is cptool's own.

    multiprocessing imports it for objects that are pickled by its name, of which there are none
    then. So a script needs no `if __name__ == "__main__"` to use ranks.
    """
    main = sys.modules["__main__"]
    ours = entry.__module__.partition(".")[0] == __name__.partition(".")[0]
    if not ours and _has_file(main):
        yield
        return
    spec = getattr(main, "__spec__", None)
    main.__spec__ = ModuleSpec("__main__", None)  # under this name nothing is imported
    try:
        yield
    finally:
        main.__spec__ = spec


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Defer Ctrl-C while the body runs; a process that the body starts has it blocked from birth.

    Ctrl-C reaches every process of the terminal, and the fork server, which ignores it once it
    serves, would show a traceback while it still imports.
    """
    resource_tracker.ensure_running()  # the server would start it, which unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
