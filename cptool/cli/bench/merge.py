"""`cptool bench merge`: merging partials against torch and a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cptool.cli.bench.kernel import KernelOptions, collect, kernel_options
from cptool.cli.bench.options import (
    SPREAD,
    MeasureOptions,
    emit,
    grouped,
    measure_options,
    spread,
)
from cptool.cli.figures import plot as plots
from cptool.cli.figures.tables import Column
from cptool.cli.options.examples import examples
from cptool.cli.options.types import TokenCount
from cptool.distributed.options import check_threads
from cptool.units import byte_rate, duration, percent, three


@click.command(
    epilog=examples(
        "cptool bench merge",
        "cptool bench merge --partials 4 --tokens 1024 --heads 32",
    ),
)
@click.option(
    "--partials",
    "-n",
    type=click.IntRange(min=1),
    multiple=True,
    default=(2, 4, 8),
    show_default=True,
    help="Partial results that are merged: one of each rank.",
)
@click.option(
    "--tokens",
    "-t",
    type=TokenCount(),
    multiple=True,
    default=(16, 1024, 8192),
    show_default=True,
    help="Tokens of each partial result.",
)
@click.option(
    "--heads",
    type=click.IntRange(min=1),
    multiple=True,
    default=(8,),
    metavar="N",
    show_default=True,
    help="Query heads.",
)
@kernel_options
@measure_options
def merge(
    partials: tuple[int, ...],
    tokens: tuple[int, ...],
    heads: tuple[int, ...],
    kernel: KernelOptions,
    measuring: MeasureOptions,
) -> None:
    """Merging the partial results of N ranks, on one device.

    The ceiling is a copy of as many bytes, measured in the same rounds. Options repeat for every
    combination.
    """
    measuring.check()
    check_threads(measuring.threads)

    import torch

    from cptool.bench.merge import MergeProblem, measure

    problems = [
        MergeProblem(partials=n, tokens=t, heads=h, head_dim=d, dtype=getattr(torch, dtype))
        for d in kernel.head_dim
        for h in heads
        for dtype in kernel.dtypes
        for n in partials
        for t in tokens
    ]
    fields = collect("merge", measure, problems, measuring)
    emit(fields, as_json=measuring.as_json, columns=_COLUMNS, row=_row, caption=_CAPTION)
    if measuring.plot:
        _draw(measuring.plot, fields["results"])


_COLUMNS = (
    Column(name="dtype", left=True),
    Column(name="heads"),
    Column(name="D"),
    Column(name="partials"),
    Column(name="tokens"),
    Column(name="time"),
    Column(name="of ceiling", rank=1),
    Column(name="rate", rank=2),
    Column(name="times torch", rank=3),
    Column(name="error", rank=4),
    *SPREAD,
)
_CAPTION = (
    "Of ceiling: of a copy of as many bytes, read and written. Times torch: torch's time over this "
    "one. Errors: the largest against float64."
)


def _row(r: dict[str, Any]) -> list[str]:
    return [
        r["dtype"],
        str(r["heads"]),
        str(r["head_dim"]),
        str(r["partials"]),
        f"{r['tokens']:,}",
        duration(r["seconds"]["median"]),
        percent(r["of_ceiling"]),
        byte_rate(r["bytes"]),
        three(r["torch_over_ours"]),
        f"{r['error']:.1e}",
        *spread(r["seconds"]),
    ]


def _draw(path: Path, results: list[dict[str, Any]]) -> None:
    kinds = grouped(
        results, lambda r: f"{r['partials']} of {r['dtype']}, {r['heads']} heads of {r['head_dim']}"
    )
    lines = [
        plots.Line(label=name, x=[r["tokens"] for r in rows], y=[r["bytes"] / 1e9 for r in rows])
        for name, rows in kinds.items()
    ]
    plots.draw(
        path,
        lines,
        title="Merging partials",
        x="tokens",
        y="GB/s read and written",
        logarithmic="x",
        ticks=sorted({r["tokens"] for r in results}),
    )
