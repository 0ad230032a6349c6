"""A run's temporary folder."""

from __future__ import annotations

import os
import stat
import tempfile
import weakref
from pathlib import Path

from cptool.errors import RunError
from cptool.host import abandoned

# Bytes for what the processes of a run write there: their store, status board and socket names.
_ROOM = 1 << 20

_folders: weakref.WeakSet[Folder] = weakref.WeakSet()


class Folder:
    """A new folder in `place` that only this user can enter; a context manager that removes it.

    If this process is killed, the next run removes the folder.
    """

    def __init__(self, place: str) -> None:
        self.name = tempfile.mkdtemp(prefix=abandoned.PREFIX, dir=place)
        self._lock: int | None = None
        try:
            self._lock = abandoned.lock(self.name)
        except OSError:
            self.cleanup()
            raise
        _folders.add(self)

    def __enter__(self) -> str:
        return self.name

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    def cleanup(self) -> None:
        """Remove the folder. Further calls have no effect."""
        abandoned.remove(self.name)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def others_can_replace(place: str) -> bool:
    """Return whether any user may rename what is in the directory and put something else in its
    place.
    """
    try:
        mode = os.stat(place).st_mode
    except OSError:  # reported where the directory is used
        return False
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def in_memory(place: str) -> bool:
    """Return whether files in the directory are in memory themselves."""
    try:
        device = os.stat(place).st_dev
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    kinds = [line.partition(" - ")[2].split()[0] for line in mounts if line.split()[2] == number]
    return any(kind in ("tmpfs", "ramfs") for kind in kinds)


def _place() -> str:
    """Return the temporary directory, or /tmp if other users could replace a folder in it."""
    place = tempfile.gettempdir()
    return "/tmp" if others_can_replace(place) else place


def make_folder(place: str | None = None) -> Folder:
    """Return a folder of this run's own in `place`, by default the temporary directory.

    Folders that killed runs of this user left there are removed first. Raises RunError, one line
    with the place and the remedy, if the directory does not exist, is full, or is not safe.
    """
    remedy = "set TMPDIR to a directory that has room and can be written to"
    try:
        place = place or _place()
    except FileNotFoundError as error:
        raise RunError(f"{error.strerror}; {remedy}") from None
    abandoned.sweep(place)
    try:
        if others_can_replace(place):
            raise RunError(
                f"{place}: any user can replace what is in the temporary directory (it is writable "
                "for all and has no sticky bit); chmod +t it, or set TMPDIR to another"
            )
        found = os.statvfs(place)
        free = found.f_bavail * found.f_frsize
        if free < _ROOM or (found.f_files and found.f_favail < 16):
            raise RunError(
                f"{place}: the temporary directory is full ({free >> 10} KiB free, a run needs "
                f"{_ROOM >> 10} KiB); make room, or {remedy}"
            )
        return Folder(place)
    except OSError as error:
        raise RunError(f"{place}: {error.strerror}; {remedy}") from None


def remove_folders() -> None:
    """Remove all folders that still exist, for a process that ends without unwinding."""
    for folder in list(_folders):
        folder.cleanup()
