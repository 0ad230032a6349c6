"""Repositories of the Hugging Face hub, fetched with its library."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptool.checkpoint.fetching import Watch, unwatched
from cptool.checkpoint.fields import first_line
from cptool.errors import UserError
from cptool.files import home

if TYPE_CHECKING:
    from tqdm import tqdm

_FILES = ["*.json", "*.jinja", "*.chk", "tokenizer.model", "model*.safetensors"]
_META_WEIGHTS = ["consolidated*.pth"]
_POLL_S = 0.1
_TO_STOP_S = 2.0
_STEP = "downloading from the hub"


def snapshot(hub_id: str, watch: Watch | None) -> Path:
    """Return the local snapshot of a hub repository, fetched if it is not there yet.

    If `watch` is None, the hub's library draws bars of its own. Files that are here are kept; one
    that an interrupted download has left in part does not count. Raises UserError, one line, for
    whatever goes wrong.
    """
    from cptool.checkpoint.meta.reader import is_meta

    path = _fetch(hub_id, _FILES, watch)
    # Only now: many repositories have the weights in both layouts.
    return _fetch(hub_id, _META_WEIGHTS, watch) if is_meta(path) else path


def gguf_file(reference: str, watch: Watch | None) -> Path:
    """Return the path of a GGUF file of a hub repository, org/name/FILE.gguf, which is fetched with
    all other parts of its model if it is split. `watch` and errors are as for `snapshot`.
    """
    from cptool.checkpoint.gguf.parts import siblings

    organisation, repository, name = reference.split("/", 2)
    hub_id = f"{organisation}/{repository}"
    path = _fetch(hub_id, [siblings(name)], watch) / name
    if not path.is_file():
        raise UserError(
            f"{reference}: the hub's repository {hub_id} has no such file; give the name that it "
            f"has there"
        )
    return path


def _fetch(hub_id: str, patterns: list[str], watch: Watch | None) -> Path:
    """Return the snapshot of a repository with the files that match `patterns`."""
    if not any(os.environ.get(name) for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME")):
        home("HF_HOME")  # without one the library would make a folder `~` here
    from huggingface_hub import snapshot_download

    try:
        if watch is None:
            return Path(snapshot_download(hub_id, allow_patterns=patterns))
        return _watched(hub_id, patterns, watch)
    except Exception as error:  # Its errors have no common root that holds over its versions.
        raise UserError(
            f"{hub_id}: no such directory or file, and it could not be downloaded from the hub "
            f"({first_line(error)}); check the name and the network, or give a local path"
        ) from None


def _watched(hub_id: str, patterns: list[str], watch: Watch) -> Path:
    """Fetch the files that match `patterns`; a Ctrl-C ends it within a file."""
    from huggingface_hub import snapshot_download

    stop = threading.Event()
    total = 0 if watch is unwatched else _missing(hub_id, patterns)
    counter = _counter(watch, total, stop)
    fetched: Future[str] = Future()

    def fetch() -> None:
        try:
            fetched.set_result(
                snapshot_download(hub_id, allow_patterns=patterns, tqdm_class=counter)
            )
        except BaseException as error:
            fetched.set_exception(error)

    # The library waits for its threads whatever happens: they are told to stop from here.
    thread = threading.Thread(target=fetch, name="cptool-hub", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_POLL_S)
    finally:
        stop.set()
        thread.join(_TO_STOP_S)
    return Path(fetched.result())


def _missing(hub_id: str, patterns: list[str]) -> int:
    """Return how many bytes are to be downloaded, 0 if that is not known."""
    from huggingface_hub import snapshot_download

    quiet = _counter(unwatched, 0, threading.Event())
    try:
        files: Any = snapshot_download(
            hub_id, allow_patterns=patterns, dry_run=True, tqdm_class=quiet
        )
    except Exception:  # Older libraries cannot; whatever else is wrong, the download reports.
        return 0
    return sum(file.file_size for file in files if file.will_download)


def _counter(watch: Watch, total: int, stop: threading.Event) -> type[tqdm[Any]]:
    """Return a class for the library to make its bars of, which draws nothing and reports bytes.

    The library may count bytes twice, as they arrive and as they are stored; the larger count is
    reported.
    """
    from tqdm import tqdm

    most = 0

    class Counter(tqdm):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, unit: str = "it", **settings: Any) -> None:
            self._counts_bytes = unit == "B"
            super().__init__(*arguments, **settings | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal most
            if stop.is_set():
                raise InterruptedError("the download was interrupted")
            self.n += int(n or 0)
            if self._counts_bytes and self.n > most:
                most = int(self.n)
                watch(_STEP, most, max(most, total) if total else 0)

    return Counter
