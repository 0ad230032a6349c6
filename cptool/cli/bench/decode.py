"""`cptool bench decode`: time per token, measured beside predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

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
    SPREAD,
    MeasureOptions,
    emit,
    grouped,
    measure_options,
    spread,
)
from cptool.cli.figures import plot as plots
from cptool.cli.figures.tables import Column
from cptool.cli.options import completion
from cptool.cli.options.examples import examples
from cptool.cli.options.models import open_shape
from cptool.cli.options.types import TokenCount
from cptool.units import byte_rate, duration, percent, three


@click.command(
    short_help="Decode steps over cached lengths, ranks and variants.",
    epilog=examples(
        "cptool bench decode llama3-8b --cached 8K --cp 1 --cp 2",
        "cptool bench decode MODEL --cached 32K --batch 4 --variant auto",
    ),
)
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
    config = open_shape(model)
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
        caption=caption(shown, sweep, _NOTE, fields["profile"]),
    )
    if measuring.plot:
        _draw(measuring.plot, fields["results"], f"{shown}, batch {batch}")


_COLUMNS = (
    Column(name="N"),
    Column(name="batch"),
    Column(name="cached"),
    Column(name="variant", left=True),
    Column(name="per step"),
    Column(name="tokens/s", rank=1),
    Column(name="predicted", rank=2),
    Column(name="ratio", rank=3),
    Column(name="regret", rank=4),
    Column(name="exposed", rank=5),
    Column(name="of ceiling", rank=6),
    Column(name="read per rank", rank=7),
    *SPREAD,
)
_NOTE = (
    "N: ranks. A step gives one token to each sequence of the batch. Ratio: predicted over "
    "measured. Exposed: time that ranks stood waiting for messages. Read: weights and KV; of "
    "ceiling: of reading a weight matrix. Regret: what auto lost against the fastest."
)


def _row(r: dict[str, Any]) -> list[str]:
    return [
        str(r["ranks"]),
        str(r["batch"]),
        f"{r['cached']:,}",
        asked(r),
        duration(r["ttit_seconds"]["median"]),
        three(r["tokens_per_s"]),
        duration(r["predicted_s"]),
        three(r["predicted_over_measured"]),
        percent(r.get("regret")),
        duration(r["exposed_seconds"]["median"]),
        percent(r["of_ceiling"]),
        byte_rate(r["bytes"]),
        *spread(r["ttit_seconds"]),
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
