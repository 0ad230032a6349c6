"""`cptool bench calibrate`: measure the hardware profile that `auto` uses."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import click

from cptool.cli import draw
from cptool.cli.figures.tables import wide_option
from cptool.cli.json_output import print_object
from cptool.cli.options.common import DTYPES, device_option, json_option, threads_option
from cptool.cli.progress import progress
from cptool.units import byte_rate, duration, flop_rate, percent

if TYPE_CHECKING:
    from cptool.distributed.world import World
    from cptool.planning.hardware import HardwareProfile


@click.command(short_help="Measure compute and links of this machine, for `auto`.")
@click.option(
    "--cp",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ranks.  [default: 2, and on a CPU 4 as well]",
)
@threads_option
@device_option
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    help="Measure this one.  [default: auto, bfloat16 and float32]",
)
@json_option
@wide_option
def calibrate(cp: int | None, threads: int | None, device: str, dtype: str, as_json: bool) -> None:
    """Measure compute and links of this machine for the choice of variants, and keep the result.

    Under a launcher, as many ranks as it started. The profile stays in the user's cache
    (hardware.json); `--variant auto` reads it from there.
    """
    from cptool.distributed import devices, launch
    from cptool.distributed.environment import launched_size
    from cptool.distributed.options import RankOptions, check_size
    from cptool.planning.profiles import check_place

    launched = launched_size()
    # What ranks lose by sharing cores is measured separately: others are bound to their own.
    more = cp is None and launched is None and devices.resolve_device(device, 2) == "cpu"
    cp = cp or launched or 2
    check_size(cp, 1)
    check_place()
    dtypes = ("bfloat16", "float32") if dtype == "auto" else (dtype,)
    ranks = RankOptions(cp=cp, device=device, threads=threads)
    with progress() as watch:
        profile, path, rank = launch.run(_on_rank, dtypes, None, ranks=ranks, watch=watch)
        if more:
            ranks = replace(ranks, cp=2 * cp)
            profile, path, rank = launch.run(_on_rank, dtypes, profile, ranks=ranks, watch=watch)
    if rank:
        return
    if as_json:
        print_object({"path": path, **asdict(profile)})
        return
    draw.table([*_rows(profile, dtypes, cp), ("kept in", path)])


def _on_rank(
    world: World, dtypes: tuple[str, ...], profile: HardwareProfile | None
) -> tuple[HardwareProfile, str, int]:
    """Measure everything, or on more ranks what `profile` lacks."""
    from cptool.calibration import measure, measure_more_ranks
    from cptool.planning.profiles import profile_path, save_profile

    if profile is None:
        profile = measure(world, dtypes)
    else:
        profile = measure_more_ranks(world, dtypes, profile)
    if world.local_rank == 0:
        save_profile(profile)
    return profile, str(profile_path()), world.rank


def _rows(profile: HardwareProfile, dtypes: tuple[str, ...], cp: int) -> list[tuple[str, str]]:
    rows = [
        (
            name,
            f"linear layers {flop_rate(profile.linear_flops[name])}, "
            f"attention {flop_rate(profile.attention_flops[name])} per rank",
        )
        for name in dtypes
    ]
    rows.append(
        (
            "memory",
            f"weights {byte_rate(profile.memory_bandwidth)}, "
            f"keys and values {byte_rate(profile.cache_bandwidth)} per rank",
        )
    )
    if cp > 1:
        link = profile.link(cp)
        rows.append(
            (
                "link",
                f"{byte_rate(link.bandwidth)} one way, "
                f"{duration(link.latency_s)} per message, "
                f"{duration(link.message_overhead_s)} each further one; "
                f"compute beside a transfer loses {percent(profile.transfer_steals)} of its time",
            )
        )
    else:
        rows.append(("link", "not measured on one rank; the default is kept"))
    rows.append(
        (
            "overheads",
            f"{duration(profile.call_overhead_s)} per call of attention, "
            f"{duration(profile.layer_overhead_s)} per layer, "
            f"{duration(profile.forward_overhead_s)} per forward",
        )
    )
    for ranks, found in profile.residual_s.items():
        beyond = {name: sum(pair) / 2 for name, pair in found.items()}
        rows.append(
            (
                f"on {ranks} ranks",
                "a layer takes, beyond these: "
                + ", ".join(f"{name} {duration(spent)}" for name, spent in beyond.items()),
            )
        )
    assert profile.rule is not None  # it was measured
    alpha, beta, gamma = profile.rule
    rows.append(
        (
            "fitted rule",
            f"{alpha:.3g} log T {beta:+.3g} log(T/(T+P)) {gamma:+.3g} > 0: keys and values travel",
        )
    )
    return rows
