"""The time left that the progress bar of a prefill shows, held against what was left.

    python benchmarks/progress_truth.py                     # 1K and 4K tokens on 1 and 2 ranks
    python benchmarks/progress_truth.py MODEL --tokens 16K --cp 1 --json FILE

The bar's time left is elapsed x (1 - share) / share (`cptool.cli.progress`). From a fifth of the
run on, its error is given as a part of the run. Other programs that come and go change what is
left, which no bar can know: the last column says for how much of the run they had a processor.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import checkout  # noqa: F401
import click
from rich.console import Console
from rich.table import Table

from cptool.bench.timing import circumstances
from cptool.checkpoint import open_checkpoint
from cptool.cli.launch import _on_rank
from cptool.cli.options.types import TokenCount
from cptool.distributed import launch
from cptool.distributed.options import RankOptions
from cptool.distributed.status_board import Board
from cptool.engine.options import resolve_dtype
from cptool.engine.turn import Turn

FIRST = 0.2
"""The part of the run from which on the bar is to be true."""


def measure(model: str, tokens: int, cp: int) -> dict[str, float]:
    """Run one prefill and return the bar's errors, as parts of the run's time."""
    checkpoint = open_checkpoint(model, 2 * tokens)
    ranks = RankOptions(cp=cp, device="cpu", threads=1)
    prompt = tuple(i % 1000 + 10 for i in range(tokens))
    dtype = resolve_dtype("auto", checkpoint, ranks.device)
    seen: list[tuple[float, float, float]] = []  # now, when the forward began, share

    def watch(board: Board) -> None:
        work = board.read(0).work
        if work is not None:
            seen.append((time.monotonic(), work.began, work.share))

    turn = Turn(model=str(checkpoint.path), prompts=(prompt,), dtype=dtype)
    report, _ = launch.run(_on_rank, turn, ranks=ranks, watch=watch)
    began, whole = seen[0][1], report.ttft_s
    errors = [
        (elapsed * (1 - share) / share - (whole - elapsed)) / whole
        for elapsed, share in ((now - began, share) for now, _, share in seen)
        if share and FIRST * whole <= elapsed <= whole
    ]
    return {
        "tokens": tokens,
        "cp": cp,
        "ttft_s": whole,
        "samples": len(errors),
        "worst_early": min(errors),
        "worst_late": max(errors),
        "mean": sum(map(abs, errors)) / len(errors),
        "processors_shared": report.processor_wait_s / whole,
    }


@click.command()
@click.argument("model", default="smollm2-135m-instruct")
@click.option("--tokens", type=TokenCount(), multiple=True, default=(1024, 4096))
@click.option("--cp", type=click.IntRange(min=1), multiple=True, default=(1, 2))
@click.option("--json", "to", type=Path)
def main(model: str, tokens: tuple[int, ...], cp: tuple[int, ...], to: Path | None) -> None:
    """Measure every combination, print a table and write it with --json."""
    results = [measure(model, count, ranks) for count in tokens for ranks in cp]
    table = Table(title="Time left by the bar minus time left, from a fifth of the run on")
    for name in ("tokens", "ranks", "run", "too short", "too long", "mean", "shared"):
        table.add_column(name, justify="right")
    for r in results:
        parts = (r["worst_early"], r["worst_late"], r["mean"], r["processors_shared"])
        shown = [f"{r['tokens']:,}", str(r["cp"]), f"{r['ttft_s']:.1f} s"]
        table.add_row(*shown, *(f"{part:+.0%}" for part in parts))
    Console().print(table)
    if to is not None:
        to.write_text(json.dumps({"results": results, **circumstances()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
