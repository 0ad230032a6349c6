"""`cptool bench link`: transfers between the ranks as they were launched."""

import click

from cptool import units
from cptool.cli import draw
from cptool.cli.bench.options import emit, grouped, measure_options, percent, spread
from cptool.cli.types import Bytes

PATTERNS = ("send-receive", "all-gather", "all-to-all")


@click.command(short_help="Send-receive, all-gather, all-to-all between ranks.")
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
    help="Bytes that a rank gives to one other.",
)
@click.option(
    "--pattern",
    "patterns",
    type=click.Choice(PATTERNS),
    multiple=True,
    default=PATTERNS,
    show_default=True,
)
@click.option(
    "--overlap/--no-overlap",
    default=True,
    help="Whether to measure compute beside a transfer.  [default: it is]",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=300.0,
    metavar="S",
    help="Seconds to wait for another rank.  [default: 300]",
)
@measure_options
def link(cp, sizes, patterns, overlap, timeout, device, threads, repeats, plot, as_json):
    """Send-receive along the ring, all-gather and all-to-all between ranks, over message sizes.

    Ranks are started here, or, under torchrun or srun, are those of the launcher, over its
    network. On CPUs the ceiling is a plain TCP stream between the same neighbours, in the same
    rounds.
    """
    from cptool.cli import plot as plots
    from cptool.distributed import launch
    from cptool.distributed.environment import launched_size
    from cptool.distributed.options import RankOptions, check_size

    plots.check(plot)
    cp = cp or launched_size() or 2
    check_size(cp, 1)
    with draw.progress() as watch:
        results, facts, rank = launch.run(
            _on_rank,
            list(sizes),
            list(patterns),
            repeats,
            overlap,
            ranks=RankOptions(cp=cp, device=device, threads=threads, timeout=timeout),
            watch=watch,
        )
    if rank:
        return
    emit(
        {"ranks": cp, **facts, "results": results},
        as_json=as_json,
        columns=("pattern", "size", "ms (least to most)", "GB/s a rank", "of TCP", "compute loses"),
        row=_row,
        caption="GB/s: what leaves a rank. Compute loses: of the transfer's time, what twice as "
        "long a compute gets longer beside it.",
    )
    if plot:
        _draw(plots, plot, results)


def _on_rank(world, sizes, patterns, repeats, overlap):
    import torch
    import torch.distributed as dist

    from cptool.bench.link import measure

    results = measure(world, sizes, patterns, repeats, overlap)
    facts = {
        "device": world.device.type,
        "threads": torch.get_num_threads(),
        "ranks_of_a_host": world.local_size,
        "backend": dist.get_backend(world.cp_group),
    }
    return results, facts, world.rank


def _row(r) -> list[str]:
    return [
        r["pattern"],
        units.size(r["size"]),
        spread(r["seconds"]),
        f"{r['rate'] / 1e9:.3g}",
        percent(r["of_ceiling"]),
        percent(r.get("steals")),
    ]


def _draw(plots, path, results) -> None:
    kinds = grouped(results, lambda r: r["pattern"])
    lines = [
        plots.Line(name, [r["size"] for r in rows], [r["rate"] / 1e9 for r in rows])
        for name, rows in kinds.items()
    ]
    tcp = [
        (r["size"], r["size"] / r["tcp_seconds"]["median"] / 1e9)
        for r in next(iter(kinds.values()))
        if r["tcp_seconds"]
    ]
    if tcp:
        lines.append(plots.Line("plain TCP", *zip(*tcp, strict=True), dashed=True))
    plots.draw(
        path,
        lines,
        title="Transfers between ranks",
        x="bytes to one other rank",
        y="GB/s that leave a rank",
        logarithmic="xy",
    )
