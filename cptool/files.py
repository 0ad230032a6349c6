"""Private files that are written whole or not at all, and reading with a limit."""

import errno
import hashlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any, BinaryIO

from cptool.errors import UserError

_LONGEST_NUMBER = 20
"""Digits of an integer in a JSON file; no size, position or token id has more."""


def make_private(directory: Path) -> None:
    """Create the directory and its missing parents, readable by this user alone."""
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    for place in reversed(missing):
        try:
            place.mkdir(mode=0o700)
            place.chmod(0o700)  # whatever the umask
        except FileExistsError:  # made by another run in the meantime
            if not place.is_dir():
                raise


def create(path: Path) -> BinaryIO:
    """Create a file that this user alone can read and write, and open it for writing.

    Raises FileExistsError if anything is there, a link included.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    os.fchmod(descriptor, 0o600)  # whatever the umask
    return os.fdopen(descriptor, "wb", buffering=0)


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write every byte of the one-dimensional `data`, in as many steps as the system needs."""
    rest = memoryview(data)
    while len(rest):
        rest = rest[file.write(rest[: 1 << 30]) :]


def replace_whole(path: Path, data: bytes) -> None:
    """Replace the contents of a private file by `data`, on disk, in one atomic step.

    If the process is killed, the file is as before; a file of its name with 8 hex digits and ".tmp"
    may remain beside it.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with create(temporary) as file:
            write_all(file, data)
            os.fsync(file.fileno())
        sync(path.parent)  # the files that `data` names come first
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Block until the file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # directories cannot be synced here
            raise
    finally:
        os.close(descriptor)


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a regular file; ValueError for anything else, or for more than `limit` bytes.

    Pipes and devices do not block.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("it is a link that leads to itself") from None
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError("it is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > limit:
            raise ValueError(f"it has {status.st_size} bytes, at most {limit} are read")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return data


def parse_json(data: bytes) -> Any:
    """Parse JSON that holds integers, strings, lists and objects, each key once.

    Raises ValueError for anything else.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_each_once,
            parse_int=_integer,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for at, key in enumerate(keys) if key in keys[:at])
        raise ValueError(f"{twice[:40]!r} is given twice")
    return fields


def _integer(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _no_number(text: str) -> None:
    raise ValueError(f"{text[:40]} is not an integer")


def cache_dir() -> Path:
    """Return the directory of downloaded models and measured profiles, which need not exist.

    It is `$CPTOOL_CACHE`, else `$XDG_CACHE_HOME/cptool` if that is an absolute path, as its
    specification requires, else `~/.cache/cptool`. Raises UserError for a user without a home;
    callers that can do without a cache catch it.
    """
    if own := os.environ.get("CPTOOL_CACHE"):
        return expanded(own).absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):
        return Path(shared) / "cptool"
    return home("CPTOOL_CACHE") / ".cache" / "cptool"


def home(instead: str) -> Path:
    """Return the user's home directory.

    Raises UserError if there is none, as in a container whose user has no entry in /etc/passwd;
    `instead` is the environment variable that replaces it.
    """
    try:
        return Path.home()
    except RuntimeError:
        raise UserError(
            f"there is no home directory to keep files in (HOME is not set, and user id "
            f"{os.getuid()} is not in /etc/passwd); set {instead} to a directory"
        ) from None


def expanded(path: str | os.PathLike[str]) -> Path:
    """Replace `~` in `path` by a home directory; UserError if that is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path}: the home directory that it begins with is not known; write the path in full"
        ) from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
