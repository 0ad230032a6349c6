"""Temporary places of a run: its folder, and what its processes need of the system's own."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import weakref

from cptool.errors import RunError

# What the processes of a run write there besides: addresses, the agent's files, results.
_ROOM = 1 << 20
# A socket's address has at most 107 bytes, of which multiprocessing takes these for its own name.
_LONGEST = 107 - len("/pymp-abcdefgh/listener-abcdefgh")

_folders: weakref.WeakSet[tempfile.TemporaryDirectory] = weakref.WeakSet()


def make_folder() -> tempfile.TemporaryDirectory:
    """A folder of this run's own, which only its user can enter; a context manager that removes it.

    Raises RunError, one line with the place and the remedy, where there is none, or no room in it.
    """
    remedy = "set TMPDIR to a directory that has room and can be written to"
    try:
        place = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise RunError(f"{error.strerror}; {remedy}") from None
    if len(os.fsencode(place)) > _LONGEST:
        raise RunError(
            f"{place}: the name of the temporary directory is too long for the addresses of "
            f"sockets in it, at most {_LONGEST} bytes; set TMPDIR to a shorter one"
        )
    try:
        found = os.statvfs(place)
        free = found.f_bavail * found.f_frsize
        if free < _ROOM or (found.f_files and found.f_favail < 16):
            raise RunError(
                f"{place}: the temporary directory is full ({free >> 10} KiB free, a run needs "
                f"{_ROOM >> 10} KiB); make room, or {remedy}"
            )
        folder = tempfile.TemporaryDirectory(prefix="cptool-", ignore_cleanup_errors=True)
    except OSError as error:
        raise RunError(f"{place}: {error.strerror}; {remedy}") from None
    _folders.add(folder)
    return folder


def remove_folders() -> None:
    """Remove all folders that are still there, for a process that ends without unwinding."""
    for folder in list(_folders):
        folder.cleanup()


def check_semaphores() -> None:
    """RunError where the system gives no semaphores, which processes that start each other need."""
    try:
        multiprocessing.get_context("fork").Lock()
    except OSError as error:
        raise RunError(
            f"/dev/shm: {error.strerror}; ranks need a semaphore there: make room, or mount it as "
            "tmpfs (--shm-size of a container), or use one rank"
        ) from None
