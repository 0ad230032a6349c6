"""`cptool bench decode`: time per token, measured beside predicted."""

import click

from cptool.cli import draw
from cptool.cli.bench_options import (
    DEFAULT_VARIANTS,
    emit,
    measure_options,
    model_options,
    percent,
    resolve_ranks,
    spread,
)
from cptool.cli.bench_prefill import asked
from cptool.cli.counts import TokenCount


@click.command()
@click.argument("model", metavar="MODEL|SHAPE")
@click.option("--cached", type=TokenCount(0), multiple=True, default=(1024, 8192),
              show_default=True,
              help="Tokens before the first step; repeat to compare.")  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True,
              help="Sequences, each with as many cached tokens.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), default=16, show_default=True,
              help="Tokens of a sample.")  # fmt: skip
@model_options
@measure_options
def decode(
    model, cached, batch, steps, ranks, tp, variants, layers, dtype, calibrate, device, threads,
    repeats, plot, as_json,
):  # fmt: skip
    """Sweep cached lengths, ranks and variants; predicted stands beside measured.

    MODEL and its random weights are as in `cptool bench prefill`. The ceiling is reading a weight
    matrix once, in the same rounds.
    """
    from cptool import distributed, tensor_parallel
    from cptool import plot as plots
    from cptool.model.shapes import find_shape

    plots.check(plot)
    config = find_shape(model)
    tensor_parallel.check(config, tp)
    ranks = resolve_ranks(ranks, tp)

    from cptool.bench.decode import Sweep
    from cptool.bench.forward import cut

    sweep = Sweep(
        cut(config, layers), dtype, ranks, tuple(sorted(set(cached))),
        variants or DEFAULT_VARIANTS, batch, steps, repeats, calibrate,
    )  # fmt: skip
    with draw.progress() as watch:
        fields, rank = distributed.run(
            _on_rank, sweep, cp=ranks[-1], tp=tp, device=device, threads=threads, watch=watch
        )
    if rank:
        return
    shown = f"{sweep.config.num_hidden_layers} of {config.num_hidden_layers} layers"
    head = {
        "model": model,
        "layers": sweep.config.num_hidden_layers,
        "model_layers": config.num_hidden_layers,
        "vocabulary": sweep.config.vocab_size,
        "dtype": dtype,
        "tp": tp,
        "steps": steps,
    }
    emit(
        {**head, **fields},
        as_json=as_json,
        columns=("N", "batch", "cached", "variant", "ms a token (least to most)", "predicted",
                 "pred./meas.", "exposed ms", "GB/s a rank", "of ceiling", "regret"),
        row=_row,
        caption=f"{model}, {shown}, random weights, vocabulary of {sweep.config.vocab_size:,}, "
        f"{dtype}. GB/s: weights and KV read. Of ceiling: of reading a weight matrix. Regret: what "
        f"auto lost against the fastest. Predicted from: {fields['profile']['name']}.",
    )  # fmt: skip
    if plot:
        _draw(plots, plot, fields["results"], f"{model}, {shown}, batch {batch}")


def _on_rank(world, sweep):
    import torch

    from cptool.bench.decode import measure

    fields = measure(world, sweep)
    return {"device": world.device.type, "threads": torch.get_num_threads(), **fields}, world.rank


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
    kinds = {}
    for r in results:
        if r["asked"] != "auto" or r["ranks"] == 1:
            name = f"N = {r['ranks']}" + (f", {r['variant']}" if r["ranks"] > 1 else "")
            kinds.setdefault(name, []).append(r)
    lines = []
    for name, rows in kinds.items():
        at, times = [r["cached"] for r in rows], [r["ttit_seconds"] for r in rows]
        lines.append(
            plots.Line(
                name, at, [1e3 * t["median"] for t in times],
                low=[1e3 * t["min"] for t in times], high=[1e3 * t["max"] for t in times],
            )
        )  # fmt: skip
        predicted = [1e3 * r["predicted_s"] for r in rows]
        lines.append(plots.Line("predicted", at, predicted, dashed=True))
    plots.draw(
        path, lines, title=title, x="cached tokens", y="time per token, ms", logarithmic="xy",
        ticks=sorted({r["cached"] for r in results}),
    )  # fmt: skip
