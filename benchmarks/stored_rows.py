"""Products of few rows with weights as files store them, held against reading.

    python benchmarks/stored_rows.py                            # one thread
    python benchmarks/stored_rows.py --threads 2 --json FILE

The matrices are [2 hidden, hidden]; every call takes the next of more than 64 MB of them, which no
level-2 cache holds. The rate is bytes of blocks per second; the ceiling is a plain read of as many
bytes in the same run. A rate of weights is given too, because a type of fewer bits is bound by
arithmetic earlier.
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
from cptool.ops.encodings import BLOCKS
from cptool.ops.kernels import cpu_isas, cpu_stored_isa, force_cpu_isa
from cptool.ops.stored import Blocks, StoredWeight

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "BF16")
COLD, TURN = 64 << 20, 8 << 20
"""Bytes of all weights, and at least of those that one sample reads."""


def measure(
    hidden: int, kind: str, all_rows: tuple[int, ...], ceilings: Ceilings, repeats: int
) -> list[dict[str, object]]:
    """A result per number of rows."""
    weights, size = BLOCKS[kind]
    each = 2 * hidden * hidden // weights * size
    data = large_pages.empty((-(-COLD // each), 2 * hidden, hidden // weights * size), torch.uint8)
    plain = {"BF16": torch.bfloat16, "F16": torch.float16}.get(kind)
    if plain is None:  # any bytes, of which pairs are float16 below 2 in size
        data.copy_(torch.randint(256, data.shape[1:], dtype=torch.uint8) & 0xBB)
    else:  # subnormal values would be slow on some processors
        data.copy_(torch.randn(2 * hidden, hidden).to(plain).view(torch.uint8))
    calls = -(-TURN // each)
    following = itertools.cycle([StoredWeight([Blocks(matrix, kind)]) for matrix in data])
    parts = itertools.cycle(data.flatten().split(calls * each // 64 * 64)[:-1])

    def rate(x: torch.Tensor) -> float:
        def run() -> None:
            for _ in range(calls):
                next(following).linear(x)

        return calls * each / stopwatch(run)

    measures: dict[str, Callable[[], float]] = {"read": lambda: ceilings.read(next(parts))}
    for rows in all_rows:
        x = torch.randn(rows, hidden)
        measures[f"rows {rows}"] = lambda x=x: rate(x)
    measured = interleave(measures, repeats)
    return [
        {
            "hidden": hidden,
            "type": kind,
            "threads": torch.get_num_threads(),
            "isa": cpu_stored_isa(kind),
            "rows": rows,
            "unit": "bytes/s",
            "rate": measured[f"rows {rows}"],
            "weights_per_s": measured[f"rows {rows}"]["median"] / size * weights,
            "read": measured["read"],
            "of_read": measured[f"rows {rows}"]["median"] / measured["read"]["median"],
        }
        for rows in all_rows
    ]


def draw(results: list[dict[str, object]], console: Console) -> None:
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for column in ("type", "isa", "threads"):
        table.add_column(column, no_wrap=True)
    for column in ("hidden", "rows", "GB/s (min, max)", "of read", "10^9 weights/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        low, middle, high = (r["rate"][key] / 1e9 for key in ("min", "median", "max"))
        table.add_row(
            r["type"],
            r["isa"],
            str(r["threads"]),
            str(r["hidden"]),
            str(r["rows"]),
            f"{middle:.1f} ({low:.1f}, {high:.1f})",
            f"{100 * r['of_read']:.0f}%",
            f"{r['weights_per_s'] / 1e9:.1f}",
        )
    console.print(table)


POSITIVE = click.IntRange(min=1)


@click.command(help=__doc__.partition("\n\n")[0], context_settings={"show_default": True})
@click.option("--rows", type=POSITIVE, multiple=True, default=(1, 2, 4, 8))
@click.option("--hidden", type=click.IntRange(min=256), multiple=True, default=(2048,))
@click.option("--type", "types", type=click.Choice(list(BLOCKS)), multiple=True, default=TYPES)
@click.option("--isa", type=click.Choice(cpu_isas()), help="Instead of the fastest.")
@click.option("--threads", type=POSITIVE, default=1)
@click.option("--repeats", type=POSITIVE, default=7)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(rows, hidden, types, isa, threads, repeats, json_file) -> None:
    torch.set_num_threads(threads)
    ceilings = Ceilings(threads)
    results: list[dict[str, object]] = []
    with force_cpu_isa(isa or cpu_isas()[-1]):
        for kind, width in itertools.product(types, hidden):
            results += measure(width // 256 * 256, kind, rows, ceilings, repeats)
    log = Console(stderr=True, highlight=False)
    draw(results, Console(width=None if log.is_terminal else 120, highlight=False))
    if json_file:
        head = {**circumstances(), "clock": clock_name()}
        json_file.write_text(json.dumps({**head, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
