"""What every command draws: lines on standard error, and tables without a frame."""

import sys

import click

from cptool.cli import verbosity
from cptool.cli.figures import tables
from cptool.cli.figures.wrapping import wrapped

Rows = list[tuple[str, str]]
"""Rows of a table without a frame: a name and what it is."""

# Narrower terminals wrap a table themselves: its own columns would be too narrow to read.
NARROWEST = 40

GAP = 2


def indent(rows: Rows) -> int:
    """Return the column in which the values of such a table begin."""
    return max((len(name) for name, _ in rows), default=0) + GAP


def table(rows: Rows, *, to_stderr: bool = False) -> None:
    """Print two columns without a frame, wrapped to a terminal's width; without a terminal, or with
    `--wide`, one line per row.

    Prints nothing on standard error if -q was given.
    """
    if to_stderr and verbosity.quiet():
        return
    room = tables.room(to_stderr=to_stderr)
    if room is None:
        width = indent(rows)
        for name, value in rows:
            click.echo(f"{name:{width}}{value}".rstrip(), err=to_stderr)
        return
    begin = indent(rows)
    for name, value in rows:
        width = max(room, NARROWEST, begin + 10) - begin
        first, *others = wrapped(value, width, break_long_words=True)
        click.echo(click.style(f"{name:{begin}}", bold=True) + first, err=to_stderr)
        for line in others:
            click.echo(" " * begin + line, err=to_stderr)


def say(line: str, *, always: bool = False) -> None:
    """Print a line on standard error, broken between words at a terminal's width; with -q only if
    it is `always` to be seen, as a warning about a result is.
    """
    if always or not verbosity.quiet():
        print(_folded(line), file=sys.stderr, flush=True)


def detail(line: str) -> None:
    """Print one line on standard error if -v was given: what was chosen, and why."""
    if verbosity.verbose():
        print(_folded(line), file=sys.stderr, flush=True)


def _folded(text: str) -> str:
    """Return the lines of a text, those that a terminal would break in the midst of a word broken
    between words.
    """
    room = tables.room(to_stderr=True)
    if room is None or room < NARROWEST:
        return text
    return "\n".join(
        "\n".join(wrapped(line, room)) if len(line) > room else line for line in text.split("\n")
    )
