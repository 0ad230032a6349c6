"""Tables of several columns that fit the terminal: a number is never cut.

Where columns do not fit side by side, the least important ones are left out, which a line below the
table says; if even the most important ones do not fit, a row takes several lines. `--wide` prints
all columns whatever the width. Without a terminal, there is no limit.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import click

from cptool.cli.figures.wrapping import wrapped

_GAP, _INDENT = 2, 2
_WIDE = "cptool.wide"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table.

    rank: its importance; those of the highest rank are left out first, those of rank 0 never.
    left: whether its cells are aligned to the left.
    """

    name: str
    rank: int = 0
    left: bool = False


def _keep_wide(ctx: click.Context, param: click.Parameter, wide: bool) -> None:
    ctx.meta[_WIDE] = wide


wide_option = click.option(
    "--wide",
    is_flag=True,
    expose_value=False,
    callback=_keep_wide,
    help="Print tables in full, whatever the width of the terminal.",
)


def wide() -> bool:
    """Return whether `--wide` was given."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_WIDE))


def room(*, to_stderr: bool = False) -> int | None:
    """Return how many columns the terminal has; None with `--wide`, or where there is none."""
    stream = sys.stderr if to_stderr else sys.stdout
    if stream is None or not stream.isatty() or wide():
        return None
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given):
        return int(given)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def show(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    caption: str = "",
    to_stderr: bool = False,
) -> None:
    """Print a table on standard output, or on standard error, `caption` below it.

    rows: the cells of each row, one per column.
    """
    width = room(to_stderr=to_stderr)
    layout = _arranged(columns, rows, width)
    shown = {n for group in layout.groups for n in group}
    left_out = [column.name for n, column in enumerate(columns) if n not in shown]
    missing = f"Left out for want of room: {', '.join(left_out)}; --wide prints all."
    titles = wrapped(title, width) if title and width else [title] * bool(title)
    for line in (*titles, *layout.lines(layout.heads)):
        click.echo(click.style(line, bold=True), err=to_stderr)
    for line in layout.lines(rows):
        click.echo(line, err=to_stderr)
    for text in (caption, missing if left_out else ""):
        for line in wrapped(text, width) if text and width else [text] * bool(text):
            click.echo(line, err=to_stderr)


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where columns stand: `groups` has those of each line of a row, `sizes` the width of each.

    heads: the rows of the head, like those of the body.
    """

    columns: Sequence[Column]
    heads: Sequence[Sequence[str]]
    sizes: Sequence[int]
    groups: Sequence[Sequence[int]]

    def lines(self, rows: Sequence[Sequence[str]]) -> list[str]:
        """Return the lines of some rows."""
        return [
            " " * (_INDENT * bool(number))
            + (" " * _GAP).join(self._cell(n, row[n]) for n in group).rstrip()
            for row in rows
            for number, group in enumerate(self.groups)
        ]

    def _cell(self, n: int, text: str) -> str:
        blank = " " * (self.sizes[n] - _cells(text))
        return text + blank if self.columns[n].left else blank + text


def _arranged(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None
) -> _Layout:
    """Return the columns that fit `width`, or all of them, on as many lines a row as that takes."""

    def sizes_of(heads: list[list[str]]) -> list[int]:
        return [max(map(_cells, cells)) for cells in zip(*heads, *rows, strict=True)]

    whole = [[column.name for column in columns]]
    heads, shown = whole, list(range(len(columns)))
    if width is None:
        return _Layout(columns=columns, heads=heads, sizes=sizes_of(heads), groups=[shown])
    heads = _stacked([_wrapped(c.name, [row[n] for row in rows]) for n, c in enumerate(columns)])
    sizes = sizes_of(heads)
    while _total(sizes, shown) > width:
        least = max(shown, key=lambda n: (columns[n].rank, n))
        if not columns[least].rank:
            heads, sizes = whole, sizes_of(whole)
            groups = _groups(sizes, shown, width)
            return _Layout(columns=columns, heads=heads, sizes=sizes, groups=groups)
        shown.remove(least)
    return _Layout(columns=columns, heads=heads, sizes=sizes, groups=[shown])


def _cells(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _wrapped(name: str, cells: list[str]) -> list[str]:
    """Return a column's name in lines as wide as its widest cell, or as its longest word."""
    limit = max(map(_cells, (*cells, *name.split())), default=0)
    return textwrap.wrap(name, limit, break_long_words=False, break_on_hyphens=False) or [""]


def _stacked(names: list[list[str]]) -> list[list[str]]:
    """Return the rows of the head, whose last one has the last line of each name."""
    height = max(map(len, names), default=0)
    padded = [[""] * (height - len(name)) + name for name in names]
    return [list(row) for row in zip(*padded, strict=True)]


def _total(sizes: Sequence[int], shown: Sequence[int]) -> int:
    return sum(sizes[n] for n in shown) + _GAP * (len(shown) - 1)


def _groups(sizes: Sequence[int], shown: Sequence[int], width: int) -> list[list[int]]:
    """Return the columns of each line of a row."""
    groups: list[list[int]] = [[]]
    for n in shown:
        indent = _INDENT * (len(groups) > 1)
        if groups[-1] and indent + _total(sizes, [*groups[-1], n]) > width:
            groups.append([])
        groups[-1].append(n)
    return groups
