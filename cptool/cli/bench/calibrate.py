"""`cptool bench calibrate`: measure the hardware profile that `auto` uses."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import click

from cptool.cli import draw
from cptool.cli.figures.tables import wide_option
from cptool.cli.json_output import print_object
from cptool.cli.options.common import DTYPES, device_option, json_option, threads_option
from cptool.cli.options.examples import examples
from cptool.cli.progress import progress
from cptool.errors import RunError, UserError
from cptool.ops.processor import has_bfloat16_products
from cptool.units import byte_rate, duration, flop_rate, percent, three

if TYPE_CHECKING:
    from cptool.distributed.world import World
    from cptool.planning.hardware import HardwareProfile, Measurement


@click.command(
    short_help="Measure compute and links of this machine, for `auto`.",
    epilog=examples(
        "cptool bench calibrate",
        "cptool bench calibrate --dtype float32 --force",
    ),
)
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
@click.option("--force", is_flag=True, help="Replace figures that were measured more quietly.")
@json_option
@wide_option
def calibrate(
    cp: int | None, threads: int | None, device: str, dtype: str, force: bool, as_json: bool
) -> None:
    """Measure compute and links of this machine for the choice of variants, and keep the result.

    Under a launcher, as many ranks as it started. The profile stays in the user's cache
    (hardware.json); `--variant auto` reads it from there. Figures from a busy machine do not
    replace better ones without --force.
    """
    from cptool.distributed import devices, launch
    from cptool.distributed.environment import launched_size
    from cptool.distributed.options import RankOptions, check_size
    from cptool.host.processor import load_per_processor
    from cptool.planning.profiles import check_place

    launched = launched_size()
    cp_default = cp is None and launched is None
    cp = cp or launched or 2
    check_size(cp, 1)
    check_place()
    placed = devices.resolve_device(device, cp)
    dtypes = _both(placed) if dtype == "auto" else (dtype,)
    request = Request(dtypes=dtypes, load=load_per_processor(), force=force)
    if not force:
        _check_load(placed, request)
    ranks = RankOptions(cp=cp, device=device, threads=threads)
    with progress() as watch:
        found = launch.run(_on_rank, request, ranks=ranks, watch=watch)
        # What ranks lose by sharing cores is measured apart: others are bound to their own.
        if cp_default and placed == "cpu":
            ranks, request = replace(ranks, cp=2 * cp), replace(request, profile=found.profile)
            found = launch.run(_on_rank, request, ranks=ranks, watch=watch)
    if found.rank == 0:
        _show(found, dtypes, cp, as_json=as_json)


def _both(device: str) -> tuple[str, ...]:
    """Return the dtypes to measure, that in which models compute by default first: the profile's
    other figures, such as what a layer costs at least, are its.
    """
    if device == "cpu" and not has_bfloat16_products():
        return "float32", "bfloat16"
    return "bfloat16", "float32"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure: everything, or on more ranks what `profile` lacks.

    load: the load average per processor before. force: whether to replace better figures.
    """

    dtypes: tuple[str, ...]
    load: float
    force: bool
    profile: HardwareProfile | None = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a rank has measured, and whether it is kept at `path`."""

    profile: HardwareProfile
    path: str
    kept: bool
    rank: int


def _check_load(device: str, request: Request) -> None:
    """Raise UserError, before minutes of measuring, for a load that spoils the figures."""
    from cptool.planning.hardware import Measurement
    from cptool.planning.profiles import kept_measurement

    kept, now = kept_measurement(device), Measurement(date="", load=request.load)
    if kept is not None and now.is_worse_than(kept):
        raise UserError(
            f"the load is {three(request.load)} per processor, and the figures of {kept.date} were "
            f"measured at {three(kept.load or 0)}; wait until the machine is quiet, or add --force"
        )


def _on_rank(world: World, request: Request) -> Found:
    """Measure, and keep the profile unless a better one is kept already."""
    from cptool.calibration import measure, measure_more_ranks
    from cptool.planning.profiles import kept_measurement, profile_path, save_profile

    if request.profile is None:
        profile = measure(world, request.dtypes, load=request.load)
    else:
        profile = measure_more_ranks(world, request.dtypes, request.profile)
    measured, kept = profile.measurement, kept_measurement(profile.device)
    assert measured is not None  # just now
    keep = request.force or kept is None or not measured.is_worse_than(kept)
    world.barrier()  # each machine has one file, which all its ranks have read
    if world.local_rank == 0 and keep:
        save_profile(profile)
    return Found(profile=profile, path=str(profile_path()), kept=keep, rank=world.rank)


def _show(found: Found, dtypes: tuple[str, ...], cp: int, *, as_json: bool) -> None:
    """Print the profile; raise RunError if it was not kept."""
    from cptool.planning.hardware import QUIET

    measured = found.profile.measurement
    assert measured is not None
    if as_json:
        print_object({"path": found.path, "kept": found.kept, **asdict(found.profile)})
    else:
        kept = [("kept in", found.path)] if found.kept else []
        draw.table([*_rows(found.profile, dtypes, cp), ("measured", _how(measured)), *kept])
    if not found.kept:
        raise RunError(
            f"not kept: {_quality(measured)}; {found.path} has better figures; measure again when "
            "the machine is quiet, or add --force"
        )
    if measured.noise > QUIET:
        draw.say(
            f"these figures are rough: {_quality(measured)}; measure again when the machine is "
            "quiet",
            always=True,
        )


def _how(measured: Measurement) -> str:
    return f"{measured.date} on {measured.machine}: {_quality(measured)}"


def _quality(measured: Measurement) -> str:
    return (
        f"the load was {three(measured.load or 0)} per processor, repeats of a measurement differ "
        f"by {percent(measured.spread or 0)}"
    )


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
            "for `plan --rule fitted`: with T new tokens and P cached ones, keys and values travel "
            f"where {alpha:.3g} log T {beta:+.3g} log(T/(T+P)) {gamma:+.3g} > 0, else queries do",
        )
    )
    return rows
