"""`cptool bench attention`: one call of attention against torch and the device."""

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
from cptool.cli.options.types import Heads, TokenCount
from cptool.distributed.options import check_threads
from cptool.errors import OptionError
from cptool.units import byte_rate, duration, flop_rate, percent, three


@click.command(
    short_help="Attention of new tokens over cached ones, on one device.",
    epilog=examples(
        "cptool bench attention --tokens 4K --heads 32/8 --dtype bfloat16",
        "cptool bench attention -t 1 --cached 32K --plot attention.png",
    ),
)
@click.option(
    "--tokens",
    "-t",
    type=TokenCount(),
    multiple=True,
    default=(1, 1024, 4096),
    show_default=True,
    help="New tokens; 1 is a decode step.",
)
@click.option(
    "--cached",
    type=TokenCount(0),
    multiple=True,
    help="Tokens before them.  [default: 0, and 32767 before a single token]",
)
@click.option(
    "--heads",
    type=Heads(),
    multiple=True,
    default=((8, 8), (8, 2)),
    metavar="Q/KV",
    help="Query and KV heads.  [default: 8/8 and 8/2]",
)
@kernel_options
@measure_options
def attention(
    tokens: tuple[int, ...],
    cached: tuple[int, ...],
    heads: tuple[tuple[int, int], ...],
    kernel: KernelOptions,
    measuring: MeasureOptions,
) -> None:
    """Attention of T new tokens over P cached ones and themselves, on one device.

    The ceiling is the time of its operations at the rate of a large matrix product, or that of
    reading keys and values, whichever is longer; both are measured in the same rounds. Options
    repeat for every combination.
    """
    measuring.check()
    for dim in kernel.head_dim:
        if dim % 2:
            raise OptionError("head_dim", dim, "it must be even, up to 256")
    check_threads(measuring.threads)

    import torch

    from cptool.bench.attention import AttentionProblem, measure

    problems = [
        AttentionProblem(
            tokens=t,
            cached=p,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=d,
            dtype=getattr(torch, dtype),
        )
        for d in kernel.head_dim
        for q_heads, kv_heads in heads
        for dtype in kernel.dtypes
        for t in tokens
        for p in cached or ((32767,) if t == 1 else (0,))
    ]
    fields = collect("attention", measure, problems, measuring)
    emit(fields, as_json=measuring.as_json, columns=_COLUMNS, row=_row, caption=_CAPTION)
    if measuring.plot:
        _draw(measuring.plot, fields["results"])


_COLUMNS = (
    Column(name="dtype", left=True),
    Column(name="heads", left=True),
    Column(name="D"),
    Column(name="tokens"),
    Column(name="cached"),
    Column(name="time"),
    Column(name="of ceiling", rank=1),
    Column(name="rate", rank=2),
    Column(name="times torch", rank=3),
    Column(name="KV read", rank=4),
    Column(name="error", rank=5),
    Column(name="torch's", rank=6),
    *SPREAD,
)
_CAPTION = (
    "Of ceiling: of the matrix product's rate, or of memory's (m). Times torch: torch's time over "
    "this one. Errors: the largest against float64."
)


def _row(r: dict[str, Any]) -> list[str]:
    ratio, error = r["torch_over_ours"], r["torch_error"]
    return [
        r["dtype"],
        f"{r['q_heads']}/{r['kv_heads']}",
        str(r["head_dim"]),
        f"{r['tokens']:,}",
        f"{r['cached']:,}",
        duration(r["seconds"]["median"]),
        percent(r["of_ceiling"]) + ("m" if r["bound"] == "memory" else " "),
        flop_rate(r["flops"]),
        three(ratio) if ratio else "",
        byte_rate(r["kv_bytes"]),
        f"{r['error']:.1e}",
        f"{error:.1e}" if error else "",
        *spread(r["seconds"]),
    ]


def _draw(path: Path, results: list[dict[str, Any]]) -> None:
    kinds = grouped(
        results, lambda r: f"{r['dtype']}, {r['q_heads']}/{r['kv_heads']} heads of {r['head_dim']}"
    )
    lines = []
    for name, rows in kinds.items():
        rows = sorted(rows, key=lambda r: (r["tokens"], r["cached"]))
        at = [r["tokens"] for r in rows]
        lines.append(plots.Line(label=name, x=at, y=[r["flops"] / 1e12 for r in rows]))
        peer = [
            r["flops"] * r["seconds"]["median"] / r["torch_seconds"]["median"] / 1e12
            for r in rows
            if r["torch_seconds"]
        ]
        if len(peer) == len(rows):
            lines.append(plots.Line(label="torch, the same", x=at, y=peer, dashed=True))
    plots.draw(
        path,
        lines,
        title="One call of attention",
        x="new tokens",
        y="TFLOP/s",
        logarithmic="x",
        ticks=sorted({r["tokens"] for r in results}),
    )
