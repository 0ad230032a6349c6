"""Removal of the temporary folders that killed runs left behind.

A run's folder has a random name, is closed to other users (mode 0700), and holds a file that its
process keeps locked. The system releases the lock however the process ends, so a folder whose lock
is free belongs to a dead process: the next run removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import time

if sys.platform != "win32":  # No ranks run on Windows, but plan and pull do.
    import fcntl

PREFIX = "cptool-"
_LOCK = "lock"
# A folder without a lock belongs to a process that is about to create one, or was killed before it
# could.
_UNLOCKED_FOR_S = 3600.0


def sweep(base: str) -> None:
    """Remove the folders in `base` that dead processes of this user left.

    Links are not followed, and what cannot be removed stays.
    """
    try:
        with os.scandir(base) as entries:
            found = [entry.path for entry in entries if entry.name.startswith(PREFIX)]
    except OSError:
        return
    for path in found:
        with contextlib.suppress(OSError):
            if _is_left(path):
                remove(path)


def lock(folder: str) -> int:
    """Create and lock the folder's lock file and return its descriptor.

    The file gets its final name only once it is locked, so that no other process mistakes the
    folder for an abandoned one.
    """
    new = os.path.join(folder, f"{_LOCK}.new")
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    if sys.platform != "win32":
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(new, os.path.join(folder, _LOCK))
    return descriptor


def remove(folder: str) -> None:
    """Remove a run's folder as far as possible.

    The lock is removed last: if this process is killed meanwhile, the next run recognizes the rest
    by it.
    """
    with contextlib.suppress(OSError):
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if entry.name != _LOCK]
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
    shutil.rmtree(folder, ignore_errors=True)


def _is_left(path: str) -> bool:
    """Return whether a dead process of this user left the folder; OSError if that is unknown."""
    if sys.platform == "win32":
        return False
    found = os.stat(path, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return False
    if stat.S_IMODE(found.st_mode) != 0o700:
        return False
    try:
        descriptor = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        names = set(os.listdir(path))
        return names <= {f"{_LOCK}.new"} and time.time() - found.st_mtime > _UNLOCKED_FOR_S
    try:
        # Raises BlockingIOError while the process lives.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    finally:
        os.close(descriptor)
