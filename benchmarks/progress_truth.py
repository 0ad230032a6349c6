"""The time left that the progress bar of a prefill shows, held against what was left.

    python benchmarks/progress_truth.py                     # 1K, 4K and 16K tokens, 1 and 2 ranks
    python benchmarks/progress_truth.py MODEL --tokens 16K --cp 1 --json FILE

Rank 0 reads the status board ten times a second, as the bar does, and estimates the time left as
the bar does (`cptool.cli.progress.Pace`). An estimate counts as true from a fifth of the run on if
it is within 20% of what was left, or within the half second to which the bar rounds. Other programs
that come and go change what is left, which no bar can know; so the same shares are also held
against the processor time of the rank's thread, which leaves those programs out.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import checkout  # noqa: F401
import click
from rich.console import Console
from rich.table import Table

from cptool.bench.timing import circumstances
from cptool.checkpoint import open_checkpoint
from cptool.cli.options.types import TokenCount
from cptool.cli.progress import Pace
from cptool.distributed import launch
from cptool.distributed.options import RankOptions
from cptool.engine.setup.types import resolve_dtype
from cptool.engine.turn import Report, Turn, run

if TYPE_CHECKING:
    from cptool.distributed.world import World

FIRST = 0.2
"""The part of the run from which on the bar is to be true."""
WITHIN, ROUNDED_S = 0.2, 0.5
"""The part of the time left, and the seconds, by which a true estimate may be off."""

Samples = list[tuple[float, float]]
"""Moments of a clock, and the share of the work that was done then."""


def on_rank(world: World, turn: Turn) -> tuple[Report, dict[str, Samples]]:
    """Run the turn; return the report and the samples by clock, from the beginning on."""
    thread = time.pthread_getcpuclockid(threading.get_ident())
    wall: Samples = []
    processor: Samples = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            work, used = world.board.read(world.rank).work, time.clock_gettime(thread)
            if work is not None:
                wall.append((time.monotonic(), work.share))
                processor.append((used, work.share))

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        report = run(world, turn)
    finally:
        over.set()
        watching.join()
    return report, {"wall": wall, "processor": processor}


def truth(samples: Samples) -> dict[str, float]:
    """Return how far off the estimates of the time left were, from a fifth of the run on."""
    began = samples[0][0]
    ended = next((now for now, share in samples if share >= 1), samples[-1][0])
    whole = ended - began
    pace, errors = Pace(began), []
    for now, share in samples:
        estimate, left = pace.left(now, share), ended - now
        if estimate is not None and now - began >= FIRST * whole and left > 0 and share < 1:
            errors.append((estimate - left, left))
    true = [e for e, left in errors if abs(e) <= max(WITHIN * left, ROUNDED_S)]
    return {
        "seconds": whole,
        "samples": len(errors),
        "true": len(true) / len(errors),
        "too_short_s": max(0.0, -min(e for e, _ in errors)),
        "too_long_s": max(0.0, max(e for e, _ in errors)),
        "mean_part_of_run": sum(abs(e) for e, _ in errors) / len(errors) / whole,
    }


def measure(model: str, tokens: int, cp: int) -> dict[str, object]:
    """Run one prefill and return how true the bar was."""
    checkpoint = open_checkpoint(model, 2 * tokens)
    ranks = RankOptions(cp=cp, device="cpu", threads=1)
    prompt = tuple(i % 1000 + 10 for i in range(tokens))
    dtype = resolve_dtype("auto", checkpoint, ranks.device)
    turn = Turn(model=str(checkpoint.path), prompts=(prompt,), dtype=dtype)
    report, samples = launch.run(on_rank, turn, ranks=ranks)
    return {
        "tokens": tokens,
        "cp": cp,
        "ttft_s": report.ttft_s,
        "predicted_ttft_s": report.predicted.ttft_s,
        "processors_shared": report.processor_wait_s / report.ttft_s,
        **{clock: truth(found) for clock, found in samples.items()},
    }


@click.command()
@click.argument("model", default="smollm2-135m-instruct")
@click.option("--tokens", type=TokenCount(), multiple=True, default=(1024, 4096, 16384))
@click.option("--cp", type=click.IntRange(min=1), multiple=True, default=(1, 2))
@click.option("--json", "to", type=Path)
def main(model: str, tokens: tuple[int, ...], cp: tuple[int, ...], to: Path | None) -> None:
    """Measure every combination, print a table and write it with --json."""
    results = []
    for count, ranks in ((count, ranks) for count in tokens for ranks in cp):
        results.append(measure(model, count, ranks))
        if to is not None:  # as far as it is: a long run may be ended
            to.write_text(json.dumps({"results": results, **circumstances()}, indent=1) + "\n")
    title = "Estimates of the time left that are within 20% of it, from a fifth of the run on"
    table = Table(title=title)
    for name in ("tokens", "ranks", "run", "shared", "clock", "true", "too short", "too long"):
        table.add_column(name, justify="right")
    for r in results:
        for clock in ("wall", "processor"):
            found = r[clock]
            shown = [f"{r['tokens']:,}", str(r["cp"]), f"{found['seconds']:.1f} s"]
            shown += [f"{r['processors_shared']:.0%}", clock, f"{found['true']:.0%}"]
            shown += [f"{found[name]:.1f} s" for name in ("too_short_s", "too_long_s")]
            table.add_row(*shown)
    Console().print(table)


if __name__ == "__main__":
    main()
