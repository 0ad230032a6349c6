"""Products of many rows in float32 with weights of any stored type, held against oneDNN and MKL.

    python benchmarks/many_rows.py                          # one thread
    python benchmarks/many_rows.py --isa avx2 --rows 64 --json FILE

The peers multiply with a float32 matrix that was widened before. The ceilings are those of the same
run: float32 multiply-adds, and tile products of AMX where there are any.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import checkout  # noqa: F401
import click
import torch
from ceilings import Ceilings
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from cptool.bench.timing import circumstances, clock_name, interleave, stopwatch
from cptool.ops.encodings import BLOCKS
from cptool.ops.kernels import cpu_isas, cpu_product_isa, force_cpu_isa
from cptool.ops.linear import linear
from cptool.ops.stored import Blocks, StoredWeight

TYPES = ("F32", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K")
POSITIVE = click.IntRange(min=1)


def weight(kind: str, columns: int, depth: int) -> torch.Tensor | StoredWeight:
    """Return a random matrix in that type."""
    values = torch.randn(columns, depth)
    if kind == "F32":
        return values
    if kind in ("BF16", "F16"):
        stored = values.to(torch.bfloat16 if kind == "BF16" else torch.float16)
        return StoredWeight([Blocks(stored.view(torch.uint8), kind)])
    weights, size = BLOCKS[kind]
    # Any bytes, of which pairs are float16 below 2 in size.
    data = torch.randint(256, (columns, depth // weights * size), dtype=torch.uint8) & 0xBB
    return StoredWeight([Blocks(data, kind)])


def measure(
    kind: str, shape: tuple[int, int, int], ceilings: Ceilings, repeats: int
) -> dict[str, object]:
    """Return the rates of one product [rows, depth] x [depth, columns]."""
    rows, columns, depth = shape
    x, w = torch.randn(rows, depth), weight(kind, columns, depth)
    wide = w if isinstance(w, torch.Tensor) else w.widened()
    flops = 2 * rows * columns * depth
    onednn = torch.ops.mkldnn._linear_pointwise

    def rate(run: Callable[[], object]) -> Callable[[], float]:
        return lambda: flops / stopwatch(run)

    measures = {
        "ours": rate(lambda: linear(x, w)),
        "onednn": rate(lambda: onednn(x, wide, None, "none", [], "")),
        "mkl": rate(lambda: functional.linear(x, wide)),
        "fma": lambda: ceilings.flops("fma") or 0.0,
        "amx": lambda: ceilings.flops("amx") or 0.0,
    }
    with torch.inference_mode():
        measured = interleave(measures, repeats)
    best = max(measured["onednn"]["median"], measured["mkl"]["median"])
    return {
        "type": kind,
        "rows": rows,
        "columns": columns,
        "depth": depth,
        "isa": cpu_product_isa() or "of torch",
        "threads": torch.get_num_threads(),
        "unit": "flop/s",
        **measured,
        "times_peer": measured["ours"]["median"] / best,
    }


def draw(results: list[dict[str, object]], console: Console) -> None:
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for column in ("type", "isa"):
        table.add_column(column, no_wrap=True)
    for column in ("rows", "GFLOP/s (min, max)", "oneDNN", "MKL", "times", "FMA", "AMX"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        low, middle, high = (r["ours"][key] / 1e9 for key in ("min", "median", "max"))
        others = [f"{r[name]['median'] / 1e9:.0f}" for name in ("onednn", "mkl", "fma", "amx")]
        shown = [f"{middle:.0f} ({low:.0f}, {high:.0f})", *others[:2], f"{r['times_peer']:.2f}"]
        table.add_row(r["type"], r["isa"], str(r["rows"]), *shown, *others[2:])
    console.print(table)


@click.command(help=__doc__.partition("\n\n")[0], context_settings={"show_default": True})
@click.option("--rows", type=POSITIVE, multiple=True, default=(32, 128, 1024))
@click.option("--columns", type=POSITIVE, default=2048)
@click.option("--depth", type=click.IntRange(min=256), default=2048)
@click.option("--type", "types", type=click.Choice(["F32", *BLOCKS]), multiple=True, default=TYPES)
@click.option("--isa", type=click.Choice(cpu_isas()), help="Instead of the fastest.")
@click.option("--threads", type=POSITIVE, default=1)
@click.option("--repeats", type=POSITIVE, default=9)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(rows, columns, depth, types, isa, threads, repeats, json_file) -> None:
    torch.set_num_threads(threads)
    ceilings = Ceilings(threads)
    depth = depth // 256 * 256
    with force_cpu_isa(isa or cpu_isas()[-1]):
        results = [
            measure(kind, (count, columns, depth), ceilings, repeats)
            for kind, count in itertools.product(types, rows)
        ]
    log = Console(stderr=True, highlight=False)
    draw(results, Console(width=None if log.is_terminal else 120, highlight=False))
    if json_file:
        head = {**circumstances(), "clock": clock_name()}
        json_file.write_text(json.dumps({**head, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
