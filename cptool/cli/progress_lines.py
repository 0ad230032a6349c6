"""Progress as lines of JSON on standard error, for programs: `--progress json`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from cptool.cli import json_output, verbosity
from cptool.cli.progress import SOONEST, Followed

if TYPE_CHECKING:
    from cptool.distributed.status_board import Board, Work
    from cptool.engine.turn import Report

_EVERY_S = 1.0


def _take(ctx: click.Context, param: click.Parameter, value: str) -> None:
    if value == "json":
        verbosity.write_progress_lines()


progress_option = click.option(
    "--progress",
    type=click.Choice(["auto", "json"]),
    default="auto",
    expose_value=False,
    callback=_take,
    help="While a prompt is read, draw a bar on a terminal, or write a line of JSON to standard "
    "error each second and for each chunk.  [default: auto, the bar]",
)


class Lines:
    """Writes a line each second and for each chunk while a prompt is read, and one at its end."""

    def __init__(self) -> None:
        self._followed = Followed()
        self._last: Work | None = None
        self._written = 0.0

    def watch(self, board: Board) -> None:
        """Write what the board says of rank 0, if it is time; to be called from time to time."""
        status, now = board.read(0), time.monotonic()
        work = status.work
        if work is None:
            return
        self._followed.follow(status)
        last, self._last = self._last, work
        if last is None or last.chunk != work.chunk or now - self._written >= _EVERY_S:
            self._written, followed = now, self._followed
            write(
                tokens=work.tokens,
                tokens_done=work.done,
                share=followed.share,
                seconds=followed.elapsed,
                seconds_left=followed.left if followed.share >= SOONEST else None,
                chunk=work.chunk + 1,
                chunks=work.chunks,
                variant=work.variant,
                memory_bytes=work.memory,
            )

    def end(self, report: Report) -> None:
        """Write the last line, of a prompt that was read to its end."""
        write(
            tokens=report.tokens,
            tokens_done=report.tokens,
            share=1.0,
            seconds=report.ttft_s,
            seconds_left=0.0,
            chunk=report.chunks,
            chunks=report.chunks,
            variant=report.variant,
            memory_bytes=self._last.memory if self._last else None,
        )


def write(**fields: Any) -> None:
    """Write a line."""
    click.echo(json_output.line(fields), err=True)
