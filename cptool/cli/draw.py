"""What every command draws: lines on standard error, and tables without a frame."""

import sys

import click

Rows = list[tuple[str, str]]
"""Rows of a table without a frame: a name and what it is."""

# Narrower terminals wrap a table themselves: its own columns would be too narrow to read.
NARROWEST = 40


def table(rows: Rows, *, to_stderr: bool = False) -> None:
    """Print two columns without a frame, wrapped to a terminal's width, else one line per row."""
    stream = sys.stderr if to_stderr else sys.stdout
    if stream is None or not stream.isatty():
        width = max(len(name) for name, _ in rows) if rows else 0
        for name, value in rows:
            click.echo(f"{name:{width}}  {value}".rstrip(), err=to_stderr)
        return
    from rich.console import Console
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value)
    console = Console(stderr=to_stderr, highlight=False)
    console.width = max(console.width, NARROWEST)
    console.print(grid)


def say(line: str) -> None:
    """Print one line on standard error."""
    print(line, file=sys.stderr, flush=True)
