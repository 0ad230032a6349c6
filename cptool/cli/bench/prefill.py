"""`cptool bench prefill`: time to the first token, measured beside predicted."""

import click

from cptool import units
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


@click.command(short_help="Prefill over contexts, miss rates, ranks and variants.")
@click.argument("model", metavar="MODEL|SHAPE")
@click.option(
    "--context",
    "contexts",
    type=TokenCount(),
    multiple=True,
    default=(1024, 4096),
    show_default=True,
    help="Tokens in all; repeat to compare.",
)
@click.option(
    "--miss-rate",
    "miss_rates",
    type=click.FloatRange(0, 1, min_open=True),
    multiple=True,
    default=(1.0,),
    show_default=True,
    help="Of the context, what is new: T / (T + P).",
)
@model_options
@measure_options
def prefill(
    model,
    contexts,
    miss_rates,
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
    """Sweep contexts, miss rates, ranks and variants; predicted stands beside measured.

    MODEL is a directory, a .gguf file, a name such as llama3-8b or a config.json. Only its shape
    counts: the weights are random, cut to a few layers and a small vocabulary, and so are cached
    tokens. All N take turns in one world, so that they are measured interleaved, with the same
    threads a rank.
    """
    from cptool.cli import plot as plots

    plots.check(plot)
    config, ranks = check(model, ranks, tp)

    from cptool.bench.prefill import Sweep, measure
    from cptool.calibration.rig import cut
    from cptool.distributed.options import RankOptions

    sweep = Sweep(
        config=cut(config, layers),
        dtype=dtype,
        ranks=ranks,
        contexts=tuple(sorted(set(contexts))),
        miss_rates=tuple(sorted(set(miss_rates))),
        variants=variants or DEFAULT_VARIANTS,
        repeats=repeats,
        calibrated=calibrate,
    )
    options = RankOptions(cp=sweep.ranks[-1], tp=tp, device=device, threads=threads)
    fields = measured(measure, sweep, options)
    if fields is None:
        return
    shown = title(model, config, sweep)
    emit(
        {**head(model, config, sweep, tp), **fields},
        as_json=as_json,
        columns=(
            "N",
            "context",
            "new",
            "variant",
            "ms (least to most)",
            "predicted",
            "pred./meas.",
            "exposed ms",
            "sent",
            "TFLOP/s",
            "of ceiling",
            "regret",
        ),
        row=_row,
        caption=f"{shown}, random weights, vocabulary of {sweep.config.vocab_size:,}, "
        f"{dtype}. Of ceiling: of a large matrix product's rate on each rank. Regret: what auto "
        f"lost against the fastest. Predicted from: {fields['profile']['name']}.",
    )
    if plot:
        _draw(plots, plot, fields["results"], shown)


def _row(r) -> list[str]:
    return [
        str(r["ranks"]),
        f"{r['context']:,}",
        f"{r['tokens']:,} ({r['miss_rate']:.3g})",
        asked(r),
        spread(r["ttft_seconds"]),
        f"{1e3 * r['predicted_s']:.4g}",
        f"{r['predicted_over_measured']:.2f}",
        f"{1e3 * r['exposed_seconds']['median']:.3g}",
        units.size(r["sent_bytes"]),
        f"{r['flops'] / 1e12:.3f}",
        percent(r["of_ceiling"]),
        percent(r.get("regret")),
    ]


def _draw(plots, path, results, title) -> None:
    """Over the miss rate if there are several at one context, else over the context."""
    over_miss = len({r["context"] for r in results}) == 1
    x = "miss_rate" if over_miss else "context"
    several = not over_miss and len({r["miss_rate"] for r in results}) > 1

    def name(r) -> str | None:
        rate = f", miss rate {r['miss_rate']:.3g}" * several
        return None if kind(r) is None else f"{kind(r)}{rate}"

    lines = curves(grouped(results, name), x, "ttft_seconds")
    plots.draw(
        path,
        lines,
        title=title,
        x="miss rate T / (T + P)" if over_miss else "context, tokens",
        y="time to the first token, s",
        logarithmic="xy",
        ticks=sorted({r[x] for r in results}),
    )
