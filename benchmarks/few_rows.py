"""Products of few rows with weights that no cache holds, held against oneDNN and against reading.

    python benchmarks/few_rows.py                           # one thread
    python benchmarks/few_rows.py --threads 2 --json FILE

The matrices are [2 hidden, hidden]; every call takes the next of more than 200 MB of them. The rate
is bytes of weights per second; the ceiling is a plain read of as many bytes in the same run, the
peer what `cptool.ops.linear.linear` does with more than FEW_ROWS rows.
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

from cptool.bench.timing import circumstances, clock_name, interleave, stopwatch
from cptool.host import large_pages
from cptool.ops.kernels import cpu_isas, cpu_linear_isa, force_cpu_isa
from cptool.ops.linear import FEW_ROWS, linear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLD, TURN = 200 << 20, 16 << 20
"""Bytes of all weights, and at least of those that one sample reads."""


def measure(
    hidden: int, dtype: torch.dtype, all_rows: tuple[int, ...], ceilings: Ceilings, repeats: int
) -> list[dict[str, object]]:
    """A result per number of rows."""
    each = 2 * hidden * hidden * dtype.itemsize
    weights = large_pages.empty((-(-COLD // each), 2 * hidden, hidden), dtype)
    for matrix in weights:
        matrix.copy_(torch.randn(2 * hidden, hidden))
    calls, following = -(-TURN // each), itertools.cycle(weights)

    def rate(x: torch.Tensor, few_rows: int) -> float:
        """Return the rate of `linear` if its own kernel takes calls of up to `few_rows` rows."""

        def run() -> None:
            for _ in range(calls):
                linear(x, next(following))

        before = FEW_ROWS[dtype]
        FEW_ROWS[dtype] = few_rows
        try:
            return calls * each / stopwatch(run)
        finally:
            FEW_ROWS[dtype] = before

    parts = itertools.cycle(weights.flatten().split(calls * each // dtype.itemsize)[:-1])
    measures: dict[str, Callable[[], float]] = {"read": lambda: ceilings.read(next(parts))}
    for rows in all_rows:
        x = torch.randn(rows, hidden).to(dtype)
        measures[f"ours {rows}"] = lambda x=x: rate(x, len(x))
        measures[f"onednn {rows}"] = lambda x=x: rate(x, 0)
    measured = interleave(measures, repeats)
    return [
        {
            "hidden": hidden,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "isa": cpu_linear_isa(dtype),
            "rows": rows,
            "unit": "bytes/s",
            "rate": measured[f"ours {rows}"],
            "onednn": measured[f"onednn {rows}"],
            "over_onednn": measured[f"ours {rows}"]["median"]
            / measured[f"onednn {rows}"]["median"],
            "read": measured["read"],
            "of_read": measured[f"ours {rows}"]["median"] / measured["read"]["median"],
        }
        for rows in all_rows
    ]


def draw(results: list[dict[str, object]], console: Console) -> None:
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for column in ("dtype", "isa", "threads"):
        table.add_column(column, no_wrap=True)
    for column in ("hidden", "rows", "GB/s (min, max)", "of read", "oneDNN", "x oneDNN"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        low, middle, high = (r["rate"][key] / 1e9 for key in ("min", "median", "max"))
        table.add_row(
            r["dtype"],
            r["isa"],
            str(r["threads"]),
            str(r["hidden"]),
            str(r["rows"]),
            f"{middle:.1f} ({low:.1f}, {high:.1f})",
            f"{100 * r['of_read']:.0f}%",
            f"{r['onednn']['median'] / 1e9:.1f}",
            f"{r['over_onednn']:.2f}",
        )
    console.print(table)


POSITIVE = click.IntRange(min=1)


@click.command(help=__doc__.partition("\n\n")[0], context_settings={"show_default": True})
@click.option("--rows", type=POSITIVE, multiple=True, default=(1, 2, 4, 6, 8, 12, 16, 24, 32))
@click.option("--hidden", type=POSITIVE, multiple=True, default=(512, 1024, 2048, 4096))
@click.option(
    "--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, default=tuple(DTYPES)
)
@click.option("--isa", type=click.Choice(cpu_isas()), help="Instead of the fastest.")
@click.option("--threads", type=POSITIVE, default=1)
@click.option("--repeats", type=POSITIVE, default=7)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(rows, hidden, dtypes, isa, threads, repeats, json_file) -> None:
    torch.set_num_threads(threads)
    ceilings = Ceilings(threads)
    results: list[dict[str, object]] = []
    with force_cpu_isa(isa or cpu_isas()[-1]):
        for dtype, width in itertools.product(dtypes, hidden):
            results += measure(width, DTYPES[dtype], rows, ceilings, repeats)
    log = Console(stderr=True, highlight=False)
    draw(results, Console(width=None if log.is_terminal else 120, highlight=False))
    if json_file:
        head = {**circumstances(), "clock": clock_name()}
        json_file.write_text(json.dumps({**head, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
