"""How much a command prints on standard error: -q and -v, which every command takes.

-q leaves errors and warnings about results; -v adds what was chosen and why. `cptool -q COMMAND`
and `cptool COMMAND -q` mean the same.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable

import click


class Level(enum.IntEnum):
    """What is printed on standard error beside errors and warnings about results."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


_level = Level.NORMAL
_json_lines = False


def reset() -> None:
    """Go back to NORMAL, before the options of a command line are read."""
    global _level, _json_lines
    _level, _json_lines = Level.NORMAL, False


def quiet() -> bool:
    """Return whether -q was given."""
    return _level is Level.QUIET


def verbose() -> bool:
    """Return whether -v was given."""
    return _level is Level.VERBOSE


def write_progress_lines() -> None:
    """Have progress be lines of JSON in place of bars."""
    global _json_lines
    _json_lines = True


def writes_progress_lines() -> bool:
    """Return whether --progress json was given."""
    return _json_lines


def draws_bars() -> bool:
    """Return whether progress bars are drawn: on a terminal, without -q and --progress json."""
    return not (quiet() or _json_lines) and sys.stderr is not None and sys.stderr.isatty()


def add_options(command: click.Command) -> None:
    """Give the command, and all commands of a group, -q and -v."""
    if any(param.name == "quiet" for param in command.params):
        return
    for name, level, text in (
        ("quiet", Level.QUIET, "Print only results, warnings about them, and errors."),
        ("verbose", Level.VERBOSE, "Print what was chosen, and why."),
    ):
        command.params.append(
            click.Option(
                [f"-{name[0]}", f"--{name}"],
                is_flag=True,
                expose_value=False,
                help=text,
                callback=_setter(level),
            )
        )
    if isinstance(command, click.Group):
        for subcommand in command.commands.values():
            add_options(subcommand)


def _setter(level: Level) -> Callable[[click.Context, click.Parameter, bool], None]:
    def take(ctx: click.Context, param: click.Parameter, given: bool) -> None:
        global _level
        if not given:
            return
        if _level not in (Level.NORMAL, level):
            raise click.UsageError("--quiet and --verbose exclude each other; give one of them")
        _level = level

    return take
