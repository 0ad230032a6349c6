"""`cptool plan`: what a run would take, on which layout, and why; nothing is run."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cptool.checkpoint.shapes import find_checkpoint
from cptool.cli import draw
from cptool.cli.figures.tables import wide_option
from cptool.cli.json_output import print_object
from cptool.cli.options import completion
from cptool.cli.options.common import json_option
from cptool.cli.options.examples import examples
from cptool.cli.options.models import open_shape
from cptool.cli.options.ranks import VARIANT_WORDS, VARIANTS
from cptool.cli.options.records import as_object
from cptool.cli.options.types import Chunk, Duration, TokenCount
from cptool.cli.plan.search import Search
from cptool.cli.plan.types import feed_forward, planned_types, type_options, without_fp8
from cptool.distributed.devices import resolve_device
from cptool.engine.options import EngineOptions
from cptool.engine.setup.types import mean_weight_size
from cptool.engine.world_profile import machine_profile, with_memory_of_here
from cptool.errors import OptionError, UserError
from cptool.model import shares
from cptool.planning import planner
from cptool.planning.hardware import HardwareProfile
from cptool.planning.profiles import find_profile, is_measured
from cptool.planning.strategy import RULES

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint

MISSED = 3
"""Exit code where no layout reaches the requested time to the first token."""
SWEEPS = ("contexts", "ranks", "miss-rates")


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """What the run would do; `fp8` is None where that is left to the hardware's profile."""

    context: int
    cached: int
    batch: int
    answer: int
    chunk: int | None
    dtype: str
    kv_dtype: str
    weights: str | None
    fp8: bool | None
    eager: bool
    as_published: bool


@dataclass(frozen=True, kw_only=True)
class LayoutOptions:
    """The hardware, and which layouts and variants on it are considered."""

    hardware: str | None
    cp: int | None
    tp: int | None
    max_gpus: int | None
    variant: str
    rule: str


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What to tabulate in place of one plan, if anything."""

    sweep: str | None
    plot: Path | None


@click.command(
    short_help="Predict times, memory and communication; nothing is run.",
    epilog=examples(
        "cptool plan llama3-405b --context 1M --hardware gtt-h100 --max-gpus 128",
        "cptool plan llama3-8b --context 128K --cached 100K --ttft-below 2s",
        "cptool plan llama3-8b --context 128K --sweep ranks --plot ranks.png",
    ),
)
@click.argument("model", metavar="MODEL|SHAPE", shell_complete=completion.shapes)
@as_object(
    "run",
    WorkOptions,
    [
        click.option(
            "--context",
            type=TokenCount(),
            required=True,
            metavar="N",
            help="Tokens of a sequence, cached and new, such as 128000, 128K or 1M.",
        ),
        click.option(
            "--cached",
            type=TokenCount(0),
            default=0,
            metavar="P",
            help="Tokens of the context whose KV is cached already.",
        ),
        click.option(
            "--batch", type=click.IntRange(min=1), default=1, metavar="B", help="Sequences."
        ),
        click.option(
            "--decode",
            "answer",
            type=TokenCount(0),
            default=0,
            metavar="N",
            help="Tokens of the answer, for the memory and the time of the whole.",
        ),
        click.option(
            "--chunk",
            type=Chunk(),
            metavar="N",
            help="New tokens of all sequences that go through the model at a time.  [default: "
            "auto, as many as the memory has room for and time gains from]",
        ),
        *type_options,
        click.option(
            "--fp8/--no-fp8",
            default=None,
            help="Feed-forward layers in row-wise scaled FP8.  [default: what the hardware's "
            "profile says]",
        ),
        click.option("--eager", is_flag=True, help="Decode without CUDA graphs."),
        click.option(
            "--as-published",
            is_flag=True,
            help="Plan for the paper's system: pass-KV, or pass-Q with 16-bit partials exchanged "
            "at its end; decode by pass-Q with its queries padded to a multiple of N.",
        ),
    ],
)
@as_object(
    "on",
    LayoutOptions,
    [
        click.option(
            "--hardware",
            shell_complete=completion.hardware,
            metavar="NAME|FILE",
            help="A profile such as gtt-h100, h200 or measured.  [default: what `bench calibrate` "
            "measured here; else for a checkpoint the defaults of this machine's kind, for a shape "
            "h100-sxm]",
        ),
        click.option(
            "--cp",
            type=click.IntRange(min=1),
            metavar="N",
            help="Fix the context-parallel (CP) ranks.",
        ),
        click.option(
            "--tp",
            type=click.IntRange(min=1),
            metavar="M",
            help="Fix the tensor-parallel (TP) ranks for each.",
        ),
        click.option(
            "--max-gpus",
            type=click.IntRange(min=1),
            metavar="N",
            help="The most ranks to use.  [default: one host's]",
        ),
        click.option(
            "--variant",
            type=click.Choice(VARIANTS),
            default="auto",
            show_default=True,
            help=VARIANT_WORDS,
        ),
        click.option(
            "--rule",
            type=click.Choice(RULES),
            default="predicted",
            show_default=True,
            help="How a variant is chosen: by the predicted times of all, or between pass-kv and "
            "pass-q by the paper's algorithm 1 or 5, or by the rule that `bench calibrate` "
            "fitted.",
        ),
    ],
)
@click.option(
    "--ttft-below", type=Duration(), metavar="S", help="Target for the time to the first token."
)
@as_object(
    "swept",
    SweepOptions,
    [
        click.option(
            "--sweep",
            type=click.Choice(SWEEPS),
            help="Print a table over these instead; a miss rate is "
            "the part of the context that is new: T / (T + P).",
        ),
        click.option(
            "--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the sweep."
        ),
    ],
)
@json_option
@wide_option
def plan(
    model: str,
    run: WorkOptions,
    on: LayoutOptions,
    ttft_below: float | None,
    swept: SweepOptions,
    as_json: bool,
) -> None:
    """Predict the time to the first token and between tokens, memory and communication.

    MODEL is a checkpoint, a config.json, or the shape of a published model by name (llama2-70b,
    llama3-405b, codellama-34b, ...). Without --cp and --tp the best layout is searched for. Exits
    with 3 if no layout reaches the target.
    """
    from cptool.cli.figures import plot as plots
    from cptool.cli.plan import report, sweeps

    if run.cached >= run.context:
        raise OptionError("cached", run.cached, f"it must be less than `context` {run.context}")
    _check_sweep(swept, {"ttft_below": ttft_below, "cp": on.cp, "cached": run.cached})
    search = _search(model, run, on)
    if swept.sweep is None:
        found = report.Report(search=search, answer=search.answer(ttft_below), target=ttft_below)
        if as_json:
            print_object(found.fields())
        else:
            found.draw()
        if found.answer.misses_target:
            sys.exit(MISSED)
        return
    plots.check(swept.plot)
    table = sweeps.SWEEPS[swept.sweep](search)
    if swept.plot is not None:
        sweeps.draw_plot(table, search, swept.plot)
    sweeps.show(table, search, swept.plot, as_json)


def _check_sweep(swept: SweepOptions, given: dict[str, float | None]) -> None:
    """Raise UserError for options that do not go together with the sweep, or with none."""
    if swept.plot is not None and swept.sweep is None:
        raise OptionError("plot", swept.plot, "there is nothing to draw without `sweep`")
    of_no_use = {"contexts": ("ttft_below",), "ranks": ("ttft_below", "cp")}
    of_no_use["miss-rates"] = ("ttft_below", "cached")
    for name in of_no_use.get(swept.sweep or "", ()):
        if given[name]:
            raise UserError(f"`{name}`: `sweep` {swept.sweep} does not use it; leave it out")


def _search(model: str, run: WorkOptions, on: LayoutOptions) -> Search:
    """Return what to search; UserError where the model or the hardware cannot do it."""
    notes: list[str] = []
    config, checkpoint = open_shape(model, notes), find_checkpoint(model)
    profile = _profile(on.hardware, checkpoint)
    types = EngineOptions(kv_dtype=run.kv_dtype, weights=run.weights)
    dtype, kv_dtype, weights = planned_types(run.dtype, types, profile.device, checkpoint)
    for note in (*notes, *_unmeasured(dtype, profile), *without_fp8(weights, dtype, profile)):
        draw.say(note, always=True)
    shares.check(config, on.tp or 1)
    if on.rule == "fitted" and profile.rule is None:
        raise OptionError(
            "rule",
            on.rule,
            f"{profile.name} has no coefficients of it",
            "measure them with `cptool bench calibrate`, or name another rule",
        )
    work = planner.Workload(
        config=config,
        context=run.context,
        cached=run.cached,
        batch=run.batch,
        answer=run.answer,
        dtype=dtype,
        feed_forward=feed_forward(run.fp8, dtype, profile, weights),
        weight_size=(
            mean_weight_size(checkpoint, dtype, profile.device, weights)
            if checkpoint is not None
            else None
        ),
        kv_dtype=kv_dtype,
        weights=weights,
        published=run.as_published,
        graphs=not run.eager,
        rule=on.rule,
        chunk=run.chunk,
    )
    least = (on.cp or 1) * (on.tp or 1)
    search = Search(
        model=model,
        work=work,
        profile=profile,
        cp=on.cp,
        tp=on.tp,
        variant=planner.as_published(on.variant) if run.as_published else on.variant,
        ranks=on.max_gpus or max(least, profile.ranks_per_host or profile.ranks_at_once or 1),
    )
    if checkpoint is not None or run.fp8 is not None or not search.fits_in_fp8_alone():
        return search
    note = "nothing fits with the feed-forward in {0}; planned in FP8, as --fp8 asks for"
    draw.say(note.format(dtype), always=True)
    return dataclasses.replace(search, work=search.with_work(feed_forward="float8"))


def _profile(hardware: str | None, checkpoint: Checkpoint | None) -> HardwareProfile:
    """Return the profile of that name; by default what was measured here, else for a checkpoint the
    defaults of this machine's kind, and for a shape h100-sxm.
    """
    if hardware is None and checkpoint is not None:
        return with_memory_of_here(machine_profile(resolve_device("auto")))
    name = hardware or ("measured" if is_measured() else "h100-sxm")
    profile = find_profile(name)
    return with_memory_of_here(profile) if name == "measured" else profile


def _unmeasured(dtype: str, profile: HardwareProfile) -> list[str]:
    """Return the note that a measured profile has no measured rates of `dtype`, if that is so."""
    measured = profile.measurement.dtypes if profile.measurement else ()
    if not measured or dtype in measured:
        return []
    return [
        f"{dtype} was not measured here: its rates are those of {measured[0]} times the ratio of "
        f"the defaults; measure it with: cptool bench calibrate --dtype {dtype}"
    ]
