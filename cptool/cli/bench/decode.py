"""`cptool bench decode`: time per token, measured beside predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cptool.checkpoint.shapes import find_shape
from cptool.cli import plot as plots
from cptool.cli.bench.model import (
    SweepOptions,
    asked,
    caption,
    curves,
    head,
    kind,
    measured,
    sweep_options,
    title,
)
from cptool.cli.bench.options import (
    MeasureOptions,
    emit,
    grouped,
    measure_options,
    percent,
    spread,
)
from cptool.cli.options import completion
from cptool.cli.options.types import TokenCount


@click.command(short_help="Decode steps over cached lengths, ranks and variants.")
@click.argument("model", metavar="MODEL|SHAPE", shell_complete=completion.shapes)
@click.option(
    "--cached",
    type=TokenCount(0),
    multiple=True,
    default=(1024, 8192),
    show_default=True,
    help="Tokens before the first step; repeat to compare.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Sequences, each with as many cached tokens.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=16, show_default=True, help="Tokens of a sample."
)
@sweep_options
@measure_options
def decode(
    model: str,
    cached: tuple[int, ...],
    batch: int,
    steps: int,
    swept: SweepOptions,
    measuring: MeasureOptions,
) -> None:
    """Sweep cached lengths, ranks and variants; predicted stands beside measured.

    MODEL and its random weights are as in `cptool bench prefill`. The ceiling is reading a weight
    matrix once, in the same rounds.
    """
    measuring.check()
    config = find_shape(model)
    swept = swept.checked(config)

    from cptool.bench.decode import Sweep, measure

    sweep = Sweep(
        cached=tuple(sorted(set(cached))),
        batch=batch,
        steps=steps,
        repeats=measuring.repeats,
        **swept.fields(config),
    )
    fields = measured(measure, sweep, swept.tp, measuring)
    if fields is None:
        return
    shown = title(model, config, sweep)
    emit(
        {**head(model, config, sweep, swept.tp), "steps": steps, **fields},
        as_json=measuring.as_json,
        columns=_COLUMNS,
        row=_row,
        caption=caption(shown, sweep, _NOTE, fields["profile"]["name"]),
    )
    if measuring.plot:
        _draw(measuring.plot, fields["results"], f"{shown}, batch {batch}")


_COLUMNS = (
    "N",
    "batch",
    "cached",
    "variant",
    "ms per token (least to most)",
    "predicted",
    "pred./meas.",
    "exposed ms",
    "GB/s per rank",
    "of ceiling",
    "regret",
)
_NOTE = (
    "GB/s: weights and KV read. Of ceiling: of reading a weight matrix. Regret: what auto lost "
    "against the fastest."
)


def _row(r: dict[str, Any]) -> list[str]:
    return [
        str(r["ranks"]),
        str(r["batch"]),
        f"{r['cached']:,}",
        asked(r),
        spread(r["ttit_seconds"]),
        f"{1e3 * r['predicted_s']:.4g}",
        f"{r['predicted_over_measured']:.2f}",
        f"{1e3 * r['exposed_seconds']['median']:.3g}",
        f"{r['bytes'] / 1e9:.3g}",
        percent(r["of_ceiling"]),
        percent(r.get("regret")),
    ]


def _draw(path: Path, results: list[dict[str, Any]], title: str) -> None:
    lines = curves(grouped(results, kind), "cached", "ttit_seconds", scale=1e3)
    plots.draw(
        path,
        lines,
        title=title,
        x="cached tokens",
        y="time per token, ms",
        logarithmic="xy",
        ticks=sorted({r["cached"] for r in results}),
    )
