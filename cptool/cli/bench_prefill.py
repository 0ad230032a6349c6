"""`cptool bench prefill`: time to the first token, measured beside predicted."""

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
from cptool.cli.counts import TokenCount


@click.command()
@click.argument("model", metavar="MODEL|SHAPE")
@click.option("--context", "contexts", type=TokenCount(), multiple=True, default=(1024, 4096),
              show_default=True, help="Tokens in all; repeat to compare.")  # fmt: skip
@click.option("--miss-rate", "miss_rates", type=click.FloatRange(0, 1, min_open=True),
              multiple=True, default=(1.0,), show_default=True,
              help="Of the context, what is new: T / (T + P).")  # fmt: skip
@model_options
@measure_options
def prefill(
    model, contexts, miss_rates, ranks, tp, variants, layers, dtype, calibrate, device, threads,
    repeats, plot, as_json,
):  # fmt: skip
    """Sweep contexts, miss rates, ranks and variants; predicted stands beside measured.

    MODEL is a directory, a .gguf file, a name such as llama3-8b or a config.json. Only its shape
    counts: the weights are random, cut to a few layers and a small vocabulary, and so are cached
    tokens. All N take turns in one world, so that they are measured interleaved, with the same
    threads a rank.
    """
    from cptool import distributed, tensor_parallel
    from cptool import plot as plots
    from cptool.model.shapes import find_shape

    plots.check(plot)
    config = find_shape(model)
    tensor_parallel.check(config, tp)
    ranks = resolve_ranks(ranks, tp)

    from cptool.bench.forward import cut
    from cptool.bench.prefill import Sweep

    sweep = Sweep(
        cut(config, layers), dtype, ranks, tuple(sorted(set(contexts))),
        tuple(sorted(set(miss_rates))), variants or DEFAULT_VARIANTS, repeats, calibrate,
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
    }
    emit(
        {**head, **fields},
        as_json=as_json,
        columns=("N", "context", "new", "variant", "ms (least to most)", "predicted",
                 "pred./meas.", "exposed ms", "sent", "TFLOP/s", "of ceiling", "regret"),
        row=_row,
        caption=f"{model}, {shown}, random weights, vocabulary of {sweep.config.vocab_size:,}, "
        f"{dtype}. Of ceiling: of a large matrix product's rate on each rank. Regret: what auto "
        f"lost against the fastest. Predicted from: {fields['profile']['name']}.",
    )  # fmt: skip
    if plot:
        _draw(plots, plot, fields["results"], f"{model}, {shown}")


def _on_rank(world, sweep):
    import torch

    from cptool.bench.prefill import measure

    fields = measure(world, sweep)
    return {"device": world.device.type, "threads": torch.get_num_threads(), **fields}, world.rank


def asked(r) -> str:
    """The variant asked for, and what auto took."""
    if r["asked"] != "auto" or r["ranks"] == 1:
        return r["variant"] if r["ranks"] > 1 else ""
    few = f" on {r['active']}" if r["active"] < r["ranks"] else ""
    return f"auto: {r['variant']}{few}"


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
        draw.size(r["sent_bytes"]),
        f"{r['flops'] / 1e12:.3f}",
        percent(r["of_ceiling"]),
        percent(r.get("regret")),
    ]


def _draw(plots, path, results, title) -> None:
    """Over the miss rate if there are several at one context, else over the context."""
    over_miss = len({r["context"] for r in results}) == 1
    x = "miss_rate" if over_miss else "context"
    lines = []
    kinds = {}
    for r in results:
        if r["asked"] == "auto" and r["ranks"] > 1:
            continue
        name = f"N = {r['ranks']}" + (f", {r['variant']}" if r["ranks"] > 1 else "")
        if not over_miss and len({r["miss_rate"] for r in results}) > 1:
            name += f", miss rate {r['miss_rate']:.3g}"
        kinds.setdefault(name, []).append(r)
    for name, rows in kinds.items():
        rows = sorted(rows, key=lambda r: r[x])
        at, times = [r[x] for r in rows], [r["ttft_seconds"] for r in rows]
        lines.append(
            plots.Line(
                name, at, [t["median"] for t in times],
                low=[t["min"] for t in times], high=[t["max"] for t in times],
            )
        )  # fmt: skip
        lines.append(
            plots.Line("predicted", at, [r["predicted_s"] for r in rows], dashed=True)
        )
    plots.draw(
        path, lines, title=title, x="miss rate T / (T + P)" if over_miss else "context, tokens",
        y="time to the first token, s", logarithmic="xy", ticks=sorted({r[x] for r in results}),
    )  # fmt: skip
