"""`cptool bench decode`: time per token, measured beside predicted."""

import click

from cptool.cli.bench.model import (
    DEFAULT_VARIANTS,
    asked,
    check,
    curves,
    head,
    kind,
    measured,
    model_options,
    title,
)
from cptool.cli.bench.options import emit, grouped, measure_options, percent, spread
from cptool.cli.types import TokenCount


@click.command(short_help="Decode steps over cached lengths, ranks and variants.")
@click.argument("model", metavar="MODEL|SHAPE")
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
@model_options
@measure_options
def decode(
    model,
    cached,
    batch,
    steps,
    ranks,
    tp,
    variants,
    layers,
    dtype,
    calibrate,
    device,
    threads,
    repeats,
    plot,
    as_json,
):
    """Sweep cached lengths, ranks and variants; predicted stands beside measured.

    MODEL and its random weights are as in `cptool bench prefill`. The ceiling is reading a weight
    matrix once, in the same rounds.
    """
    from cptool.cli import plot as plots

    plots.check(plot)
    config, ranks = check(model, ranks, tp)

    from cptool.bench.decode import Sweep, measure
    from cptool.calibration.rig import cut
    from cptool.distributed.options import RankOptions

    sweep = Sweep(
        config=cut(config, layers),
        dtype=dtype,
        ranks=ranks,
        cached=tuple(sorted(set(cached))),
        variants=variants or DEFAULT_VARIANTS,
        batch=batch,
        steps=steps,
        repeats=repeats,
        calibrated=calibrate,
    )
    options = RankOptions(cp=sweep.ranks[-1], tp=tp, device=device, threads=threads)
    fields = measured(measure, sweep, options)
    if fields is None:
        return
    shown = title(model, config, sweep)
    emit(
        {**head(model, config, sweep, tp), "steps": steps, **fields},
        as_json=as_json,
        columns=(
            "N",
            "batch",
            "cached",
            "variant",
            "ms a token (least to most)",
            "predicted",
            "pred./meas.",
            "exposed ms",
            "GB/s a rank",
            "of ceiling",
            "regret",
        ),
        row=_row,
        caption=f"{shown}, random weights, vocabulary of {sweep.config.vocab_size:,}, "
        f"{dtype}. GB/s: weights and KV read. Of ceiling: of reading a weight matrix. Regret: what "
        f"auto lost against the fastest. Predicted from: {fields['profile']['name']}.",
    )
    if plot:
        _draw(plots, plot, fields["results"], f"{shown}, batch {batch}")


def _row(r) -> list[str]:
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


def _draw(plots, path, results, title) -> None:
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
