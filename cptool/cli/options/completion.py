"""What the shell completes: models, shapes, hardware profiles and sessions by name, else files.

Each function is a `shell_complete` of click: it returns the candidates that begin with the word as
it stands. They import no torch and read no more than names of files, because the user is waiting.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from cptool.errors import UserError

Items = list[CompletionItem]

_MOST = 100
"""Names beside the word that are looked at."""


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Models of the catalogue, models of the hub's cache, and files."""
    return _files() + _starting(incomplete, [*_catalogue(), *_hub()])


def models_to_pull(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Models of the catalogue."""
    return _starting(incomplete, _catalogue())


def shapes(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Names of shapes, and all that `models` returns."""
    from cptool.model.shapes import SHAPES

    named = [(name, "shape") for name in SHAPES]
    return _files() + _starting(incomplete, [*named, *_catalogue(), *_hub()])


def hardware(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Names of hardware profiles, and files."""
    from cptool.planning.profiles import known_profiles, profile_path

    named = [(name, "profile") for name in known_profiles()]
    if _is_here(profile_path):
        named.insert(0, ("measured", "by cptool bench calibrate on this machine"))
    return _files() + _starting(incomplete, named)


def sessions(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Sessions beside the word as it stands, and directories."""
    return [CompletionItem("", type="dir"), *_starting(incomplete, _sessions(incomplete))]


def models_or_sessions(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """All that `models` and `sessions` return."""
    return models(ctx, param, incomplete) + _starting(incomplete, _sessions(incomplete))


def _files() -> Items:
    """Return the request to complete names of files, which must come before other candidates."""
    return [CompletionItem("", type="file")]


def _starting(incomplete: str, named: Iterable[tuple[str, str]]) -> Items:
    return [CompletionItem(name, help=note) for name, note in named if name.startswith(incomplete)]


def _catalogue() -> list[tuple[str, str]]:
    from cptool.checkpoint import catalogue

    return [
        (name, "pulled" if _is_here(partial(catalogue.path_of, name)) else "cptool pull gets it")
        for name in catalogue.MODELS
    ]


def _hub() -> list[tuple[str, str]]:
    """Return the ids of repositories in the hub's cache, which names them models--org--name."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    try:
        names = sorted(path.name for path in cache.glob("models--*--*"))
    except OSError:
        return []
    return [
        (name.removeprefix("models--").replace("--", "/", 1), "from the hub, on this machine")
        for name in names
    ]


def _sessions(incomplete: str) -> Iterator[tuple[str, str]]:
    from cptool.session.store import exists

    folder, slash, start = incomplete.rpartition("/")
    try:
        names = sorted(os.listdir(folder + slash or "."))
    except OSError:
        return
    for name in [name for name in names if name.startswith(start)][:_MOST]:
        if exists(Path(folder + slash, name)):
            yield folder + slash + name, "session"


def _is_here(path: Callable[[], Path]) -> bool:
    try:
        return path().is_file()
    except UserError:  # a user without a home has no cache
        return False
