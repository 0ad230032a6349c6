"""Where cptool keeps files of its own, and what tells a file from another."""

import hashlib
import os
from pathlib import Path


def cache_dir() -> Path:
    """Of downloaded models and measured profiles: `$CPTOOL_CACHE`, else in the user's own cache.

    The latter is `$XDG_CACHE_HOME/cptool`, or `~/.cache/cptool` where that is not set. The
    directory need not exist yet.
    """
    if own := os.environ.get("CPTOOL_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "cptool"
    return Path.home() / ".cache" / "cptool"


def sha256(path: Path) -> str:
    """Hex digest of a file's contents."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
