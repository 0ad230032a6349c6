"""Where cptool keeps files of its own."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The directory of downloaded models: `$CPTOOL_CACHE`, else the user's cache directory.

    The latter is `$XDG_CACHE_HOME/cptool`, or `~/.cache/cptool` where that is not set. The
    directory need not exist yet.
    """
    if own := os.environ.get("CPTOOL_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "cptool"
    return Path.home() / ".cache" / "cptool"
