"""What the subcommands of `cptool bench` share: options, and how results are printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cptool.cli.figures import plot as plots
from cptool.cli.figures import tables
from cptool.cli.figures.tables import Column, wide_option
from cptool.cli.json_output import print_object
from cptool.cli.options.common import DTYPES, device_option, json_option, threads_option
from cptool.cli.options.records import as_object
from cptool.units import duration

KINDS = DTYPES[1:]


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Where to measure, how often, and how results are printed."""

    device: str
    threads: int | None
    repeats: int
    plot: Path | None
    as_json: bool

    def check(self) -> None:
        """Raise UserError, before anything is measured, for a plot that could not be drawn."""
        plots.check(self.plot)


measure_options = as_object(
    "measuring",
    MeasureOptions,
    [
        device_option,
        threads_option,
        click.option(
            "--repeats",
            type=click.IntRange(min=1),
            default=5,
            show_default=True,
            help="Interleaved rounds; one more warms up.",
        ),
        click.option(
            "--plot",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="Draw the results, as PNG, SVG or PDF.",
        ),
        json_option,
        wide_option,
    ],
)


def emit(
    fields: dict[str, Any],
    *,
    as_json: bool,
    columns: Sequence[Column],
    row: Callable[[dict[str, Any]], Sequence[str]],
    caption: str,
) -> None:
    """Print `fields` and the circumstances as one JSON object, or its "results" as a table.

    columns: of the table. row: their cells for a result.
    """
    from cptool.bench.timing import circumstances

    if as_json:
        print_object({**circumstances(), **fields})
        return
    tables.show(columns, list(map(row, fields["results"])), caption=caption)


SPREAD = (Column(name="least", rank=8), Column(name="most", rank=9))
"""Columns of the fastest and the slowest repeat."""


def spread(summary: dict[str, float]) -> list[str]:
    """Return the cells of SPREAD."""
    return [duration(summary["min"]), duration(summary["max"])]


def grouped(
    results: Sequence[dict[str, Any]], name: Callable[[dict[str, Any]], str | None]
) -> dict[str, list[dict[str, Any]]]:
    """Group results by `name`, in order of first occurrence; those named None are left out."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if (key := name(result)) is not None:
            kinds.setdefault(key, []).append(result)
    return kinds
