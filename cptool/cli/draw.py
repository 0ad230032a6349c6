"""What the commands draw: progress while ranks work, a short table when they are done."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from cptool.units import duration, size, some

if TYPE_CHECKING:
    from cptool.distributed.status_board import Board
    from cptool.engine.turn import Report

Rows = list[tuple[str, str]]
"""Rows of a table without a frame: a name and what it is."""

# Narrower terminals wrap a table themselves: its own columns would be too narrow to read.
NARROWEST = 40


def prefill_rows(report: "Report") -> Rows:
    """Return rows on what a prefill did, which variant it chose and what rate it reached."""
    rows = [
        (
            "prompt",
            some(report.tokens, "token")
            + (f" after {report.cached:,} cached" if report.cached else ""),
        ),
        ("ranks", f"{report.cp} cp x {report.tp} tp on {report.device}, {report.dtype}"),
        ("variant", f"{report.variant or 'none'} ({report.reason})"),
        (
            "first token",
            f"{duration(report.ttft_s)}, {report.tokens / report.ttft_s:,.0f} tokens/s, "
            f"{report.flops / report.ttft_s / 1e12:.3g} TFLOP/s in all (weights loaded in "
            f"{duration(report.load_s)})",
        ),
    ]
    if report.cp > 1:
        rows.append(
            (
                "exchange",
                f"{size(report.wire_bytes)} sent per rank, {duration(report.exposed_s)} exposed",
            )
        )
    return rows


def decode_rows(report: "Report") -> Rows:
    """Return rows on what a decode did and reached; none if no further token was computed."""
    if report.ttit_ms is None:
        return []
    count = sum(map(len, report.token_ids))
    rate = report.decode_bytes / report.ttit_ms / 1e6
    return [
        (
            "decode",
            f"{some(count, 'token')}, {duration(report.ttit_ms / 1e3)} each, {rate:.3g} GB/s of "
            f"weights and KV per rank ({report.decode_variant}: {report.decode_reason})",
        )
    ]


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


def profile_fields(report: "Report") -> dict[str, object]:
    """Return the profile for --json: seconds by phase, one per rank; empty without a profile."""
    if not report.phases:
        return {}
    return {"profile": {phases.name.partition(",")[0]: phases.fields() for phases in report.phases}}


def phases(report: "Report", path: str | None, *, to_stderr: bool = False) -> None:
    """Print where the time of each rank went, if there is a profile."""
    from rich.console import Console
    from rich.table import Table

    for part in report.phases:
        ranks = len(part.wall_s)
        table = Table(
            box=None,
            padding=(0, 1),
            header_style="bold",
            title=f"{part.name}: ms",
            title_justify="left",
        )
        shown = range(ranks) if ranks <= 8 else ()
        for column in ("phase", "mean", "of wall", *(f"rank {r}" for r in shown)):
            table.add_column(column, justify="left" if column == "phase" else "right")
        wall = sum(part.wall_s) / ranks
        rows = [(PHASE_NAMES.get(name, name), values) for name, values in part.phases.items()]
        rows += [("wall", part.wall_s), ("(communication hidden)", part.hidden_s)]
        for name, values in rows:
            mean = sum(values) / ranks
            table.add_row(
                name,
                f"{1e3 * mean:.4g}",
                f"{mean / wall:.1%}",
                *(f"{1e3 * values[r]:.4g}" for r in shown),
            )
        Console(stderr=to_stderr, highlight=False).print(table)
    if report.phases:
        say(f"trace: {path} (open it in ui.perfetto.dev)")


PHASE_NAMES = {
    "exposed": "communication exposed",
    "host": "host (no operation)",
    "idle": "idle (no kernel)",
}


def say(line: str) -> None:
    """Print one line on standard error."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def counting(what: str, total: int) -> Iterator["Callable[[], None]"]:
    """Draw a progress bar, if standard error is a terminal; yield what to call after each step."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def progress(*, quiet: bool = False) -> Iterator["Callable[[Board], None] | None"]:
    """Draw a progress bar; yield what to call with the ranks' status board from time to time.

    Yields None unless standard error is a terminal.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("start the ranks", total=None)

        def watch(board: "Board") -> None:
            status = board.read(0)
            if status.phase and status.phase != bar.tasks[task].description:
                bar.reset(task, description=status.phase, total=status.total or None)
            bar.update(task, completed=status.done)

        yield watch
