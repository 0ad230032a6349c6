"""`cptool bench merge`: merging partials against torch and a copy."""

import click

from cptool.cli import draw
from cptool.cli.bench_options import (
    KINDS,
    emit,
    measure_options,
    one_device,
    percent,
    spread,
)
from cptool.cli.counts import TokenCount


@click.command()
@click.option("--partials", "-n", type=click.IntRange(min=1), multiple=True, default=(2, 4, 8),
              show_default=True)  # fmt: skip
@click.option("--tokens", "-t", type=TokenCount(), multiple=True, default=(16, 1024, 8192),
              show_default=True)  # fmt: skip
@click.option("--heads", type=click.IntRange(min=1), multiple=True, default=(8,), metavar="N",
              show_default=True)  # fmt: skip
@click.option("--head-dim", "-d", type=click.IntRange(8, 256), multiple=True, default=(128,),
              show_default=True)  # fmt: skip
@click.option("--dtype", "dtypes", type=click.Choice(KINDS), multiple=True,
              default=("float32", "bfloat16"), show_default=True)  # fmt: skip
@measure_options
def merge(partials, tokens, heads, head_dim, dtypes, device, threads, repeats, plot, as_json):
    """Merging the partial results of N ranks, on one device.

    The ceiling is a copy of as many bytes, measured in the same rounds. Options repeat for every
    combination.
    """
    from cptool import plot as plots

    plots.check(plot)
    device = one_device(device, threads)

    import torch

    from cptool.bench.merge import Shape, measure

    shapes = [
        Shape(n, t, h, d, getattr(torch, dtype))
        for d in head_dim
        for h in heads
        for dtype in dtypes
        for n in partials
        for t in tokens
    ]
    results = []
    with draw.counting("merge", len(shapes)) as advance:
        for result in measure(shapes, device, repeats):
            results.append(result)
            advance()
    fields = {"device": device, "threads": torch.get_num_threads(), "results": results}
    emit(
        fields,
        as_json=as_json,
        columns=("dtype", "heads", "D", "partials", "tokens", "ms (least to most)", "GB/s",
                 "of ceiling", "times torch", "error"),
        row=_row,
        caption="Of ceiling: of a copy of as many bytes, read and written. Errors: the largest "
        "against float64.",
    )  # fmt: skip
    if plot:
        _draw(plots, plot, results)


def _row(r) -> list[str]:
    return [
        r["dtype"],
        str(r["heads"]),
        str(r["head_dim"]),
        str(r["partials"]),
        f"{r['tokens']:,}",
        spread(r["seconds"]),
        f"{r['bytes'] / 1e9:.3g}",
        percent(r["of_ceiling"]),
        f"{r['torch_over_ours']:.2f}",
        f"{r['error']:.1e}",
    ]


def _draw(plots, path, results) -> None:
    kinds = {}
    for r in results:
        name = f"{r['partials']} of {r['dtype']}, {r['heads']} heads of {r['head_dim']}"
        kinds.setdefault(name, []).append(r)
    lines = [
        plots.Line(
            name,
            [r["tokens"] for r in rows],
            [r["bytes"] / 1e9 for r in rows],
        )
        for name, rows in kinds.items()
    ]
    plots.draw(
        path, lines, title="Merging partials", x="tokens", y="GB/s read and written",
        logarithmic="x", ticks=sorted({r["tokens"] for r in results}),
    )  # fmt: skip
