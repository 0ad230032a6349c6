"""`cptool bench link`: transfers between the ranks as they were launched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

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
from cptool.cli.options.common import timeout_option
from cptool.cli.options.examples import examples
from cptool.cli.options.types import Bytes
from cptool.cli.progress import progress
from cptool.distributed.options import RankOptions, check_size
from cptool.units import byte_rate, duration, percent, size

if TYPE_CHECKING:
    from cptool.distributed.world import World

PATTERNS = ("send-receive", "all-gather", "all-to-all")


@click.command(
    short_help="Send-receive, all-gather, all-to-all between ranks.",
    epilog=examples(
        "cptool bench link --cp 4",
        "cptool bench link --pattern all-gather --size 1M --size 64M",
    ),
)
@click.option(
    "--cp",
    type=click.IntRange(min=2),
    metavar="N",
    help="Ranks.  [default: 2, or what the launcher started]",
)
@click.option(
    "--size",
    "sizes",
    type=Bytes(),
    multiple=True,
    default=("1K", "32K", "1M", "16M"),
    show_default=True,
    help="Bytes that a rank sends to one other.",
)
@click.option(
    "--pattern",
    "patterns",
    type=click.Choice(PATTERNS),
    multiple=True,
    default=PATTERNS,
    show_default=True,
    help="Who sends to whom; repeat for several.",
)
@click.option(
    "--overlap/--no-overlap",
    default=True,
    help="Whether to measure compute beside a transfer.  [default: it is]",
)
@timeout_option
@measure_options
def link(
    cp: int | None,
    sizes: tuple[int, ...],
    patterns: tuple[str, ...],
    overlap: bool,
    timeout: float,
    measuring: MeasureOptions,
) -> None:
    """Send-receive along the ring, all-gather and all-to-all between ranks, over message sizes.

    Ranks are started here, or, under torchrun or srun, are those of the launcher, over its
    network. On CPUs the ceiling is a plain TCP stream between the same neighbours, in the same
    rounds.
    """
    from cptool.distributed import launch
    from cptool.distributed.environment import launched_size

    measuring.check()
    cp = cp or launched_size() or 2
    check_size(cp, 1)
    ranks = RankOptions(cp=cp, device=measuring.device, threads=measuring.threads, timeout=timeout)
    asked = Transfers(
        sizes=list(sizes), patterns=list(patterns), repeats=measuring.repeats, overlap=overlap
    )
    with progress() as watch:
        results, facts, rank = launch.run(_on_rank, asked, ranks=ranks, watch=watch)
    if rank:
        return
    emit(
        {"ranks": cp, **facts, "results": results},
        as_json=measuring.as_json,
        columns=_COLUMNS,
        row=_row,
        caption=_CAPTION,
    )
    if measuring.plot:
        _draw(measuring.plot, results)


_COLUMNS = (
    Column(name="pattern", left=True),
    Column(name="size"),
    Column(name="time"),
    Column(name="rate per rank", rank=1),
    Column(name="of TCP", rank=2),
    Column(name="delay of compute", rank=3),
    *SPREAD,
)
_CAPTION = (
    "Rate: what leaves a rank. Delay of compute: how much longer a compute of twice the transfer's "
    "length takes beside it; none where the transfer is hidden."
)


@dataclass(frozen=True, kw_only=True)
class Transfers:
    """What every rank measures."""

    sizes: list[int]
    patterns: list[str]
    repeats: int
    overlap: bool


def _on_rank(world: World, asked: Transfers) -> tuple[list[dict[str, Any]], dict[str, Any], int]:
    import torch
    import torch.distributed as dist

    from cptool.bench.link import measure

    results = measure(world, **vars(asked))
    facts = {
        "device": world.device.type,
        "threads": torch.get_num_threads(),
        "ranks_of_a_host": world.local_size,
        "backend": dist.get_backend(world.cp_group.process_group),
    }
    return results, facts, world.rank


def _row(r: dict[str, Any]) -> list[str]:
    steals = r.get("steals")
    return [
        r["pattern"],
        size(r["size"]),
        duration(r["seconds"]["median"]),
        byte_rate(r["rate"]),
        percent(r["of_ceiling"]),
        "" if steals is None else duration(steals * r["seconds"]["median"]),
        *spread(r["seconds"]),
    ]


def _draw(path: Path, results: list[dict[str, Any]]) -> None:
    kinds = grouped(results, lambda r: r["pattern"])
    lines = [
        plots.Line(label=name, x=[r["size"] for r in rows], y=[r["rate"] / 1e9 for r in rows])
        for name, rows in kinds.items()
    ]
    tcp = [
        (r["size"], r["size"] / r["tcp_seconds"]["median"] / 1e9)
        for r in next(iter(kinds.values()))
        if r["tcp_seconds"]
    ]
    if tcp:
        sizes, rates = zip(*tcp, strict=True)
        lines.append(plots.Line(label="plain TCP", x=sizes, y=rates, dashed=True))
    plots.draw(
        path,
        lines,
        title="Transfers between ranks",
        x="bytes to one other rank",
        y="GB/s that leave a rank",
        logarithmic="xy",
    )
