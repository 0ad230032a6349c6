"""Where cptool keeps files of its own, and what tells a file from another."""

import hashlib
import os
from pathlib import Path

from cptool.errors import UserError


def cache_dir() -> Path:
    """The directory of downloaded models and measured profiles; it need not exist yet.

    `$CPTOOL_CACHE`, else `$XDG_CACHE_HOME/cptool` where that is an absolute path, as its
    specification wants it, else `~/.cache/cptool`. Raises UserError for a user without a home: what
    can do without a cache catches it.
    """
    if own := os.environ.get("CPTOOL_CACHE"):
        return expanded(own).absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):
        return Path(shared) / "cptool"
    return home("CPTOOL_CACHE") / ".cache" / "cptool"


def home(instead: str) -> Path:
    """The user's home directory. Raises UserError where there is none, as in a container whose user
    has no entry in /etc/passwd; `instead` is the environment variable that makes do without it.
    """
    try:
        return Path.home()
    except RuntimeError:
        raise UserError(
            f"there is no home directory to keep files in (HOME is not set, and user id "
            f"{os.getuid()} is not in /etc/passwd); set {instead} to a directory"
        ) from None


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with `~` replaced by a home directory. Raises UserError where that is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path}: the home directory that it begins with is not known; write the path in full"
        ) from None


def sha256(path: Path) -> str:
    """Hex digest of a file's contents."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
