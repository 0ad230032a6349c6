"""Temporary directories that are full, missing or too long, and systems without semaphores."""

import errno
import os
import resource
import tempfile
import weakref
from types import SimpleNamespace

import pytest

from cptool.distributed.status_board import Board
from cptool.errors import RunError
from cptool.host import scratch
from cptool.host.scratch import make_folder, remove_folders


def test_a_folder_is_its_users_own_and_can_be_removed_without_unwinding(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "_folders", weakref.WeakSet())  # not those of other tests
    with make_folder() as folder:
        assert os.stat(folder).st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []
    folder = make_folder()
    remove_folders()
    assert list(tmp_path.iterdir()) == [] and folder.name


def test_no_folder_is_made_where_any_user_could_replace_it(tmp_path, monkeypatch):
    tmp_path.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with make_folder() as folder:
        assert os.path.dirname(folder) == "/tmp"
    with pytest.raises(
        RunError, match=r"any user can replace what is in .*; chmod [+]t it, or set"
    ):
        make_folder(str(tmp_path))
    tmp_path.chmod(0o1777)
    with make_folder() as folder:
        assert os.path.dirname(folder) == str(tmp_path)


def space(free, files=0):
    return lambda _: SimpleNamespace(f_bavail=free, f_frsize=1, f_files=files, f_favail=3)


def test_a_place_that_does_not_do_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for found, told in (
        (space(8192), "is full \\(8 KiB free"),
        (space(1 << 30, files=100), "is full"),
    ):
        monkeypatch.setattr(os, "statvfs", found)
        with pytest.raises(RunError, match=f"^{tmp_path}: .*{told}.*set TMPDIR"):
            make_folder()
    monkeypatch.setattr(os, "statvfs", space(1 << 30))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(RunError, match="gone: No such file or directory; set TMPDIR"):
        make_folder()

    def none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(RunError, match=r"^No usable temporary directory found .*; set TMPDIR"):
        make_folder()


def test_a_board_has_its_room_or_is_refused(tmp_path):
    """A mapped page that finds no room would end a process by SIGBUS."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError):
            Board(2, tmp_path / "none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    Board(2, tmp_path / "board")
    assert os.stat(tmp_path / "board").st_blocks * 512 >= 2 * 4096
