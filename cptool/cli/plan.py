"""`cptool plan`: what a run would take, on which layout, and why; nothing is run."""

import json
import shlex
from pathlib import Path

import click

from cptool import units
from cptool.checkpoint.shapes import find_shape
from cptool.cli import draw
from cptool.cli.options import VARIANTS, json_option
from cptool.cli.types import Duration, TokenCount
from cptool.errors import UserError
from cptool.model.shapes import SHAPES
from cptool.units import duration

SHOWN = 10
SWEEPS = ("contexts", "ranks", "miss-rates")


@click.command(short_help="Predict times, memory and communication; nothing is run.")
@click.argument("model", metavar="MODEL|SHAPE")
@click.option(
    "--context",
    type=TokenCount(),
    required=True,
    metavar="N",
    help="Tokens of a sequence, cached and new, such as 128000, 128K or 1M.",
)
@click.option(
    "--cached", type=TokenCount(0), default=0, metavar="P", help="Of them, with KV already."
)
@click.option("--batch", type=click.IntRange(min=1), default=1, metavar="B", help="Sequences.")
@click.option(
    "--decode",
    "answer",
    type=TokenCount(0),
    default=0,
    metavar="N",
    help="Tokens to answer, for the memory and the time of the whole.",
)
@click.option(
    "--hardware",
    metavar="NAME|FILE",
    help="A profile such as gtt-h100, h200 or measured.  [default: what `bench calibrate` "
    "measured here, else h100-sxm]",
)
@click.option("--cp", type=click.IntRange(min=1), metavar="N", help="Fix the CP ranks.")
@click.option("--tp", type=click.IntRange(min=1), metavar="M", help="Fix the TP ranks of each.")
@click.option("--variant", type=click.Choice(VARIANTS), default="auto", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
)
@click.option(
    "--fp8/--no-fp8",
    default=None,
    help="Feed-forward layers in row-wise scaled FP8.  [default: as the hardware's owner does]",
)
@click.option("--ttft-below", type=Duration(), metavar="S", help="Target, such as 10s or 800ms.")
@click.option(
    "--max-gpus",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ranks to use at most.  [default: one host's]",
)
@click.option("--eager", is_flag=True, help="Decode without CUDA graphs.")
@click.option(
    "--as-published",
    is_flag=True,
    help="As the paper's system works: pass-KV, or pass-Q with 16-bit partials exchanged at its "
    "end; decode by pass-Q with its queries padded to a multiple of N.",
)
@click.option("--sweep", type=click.Choice(SWEEPS), help="A table over these instead.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the sweep.")
@json_option
def plan(
    model,
    context,
    cached,
    batch,
    answer,
    hardware,
    cp,
    tp,
    variant,
    dtype,
    fp8,
    ttft_below,
    max_gpus,
    eager,
    as_published,
    sweep,
    plot,
    as_json,
) -> None:
    """Predict the time to the first token and between tokens, memory and communication.

    MODEL is a checkpoint, a config.json, or the shape of a published model by name (llama2-70b,
    llama3-405b, codellama-34b, ...). Without --cp and --tp the best layout is looked for.
    """
    from cptool.model import shares
    from cptool.planning import planner
    from cptool.planning.profiles import find_profile

    if cached >= context:
        raise UserError(f"--cached {cached}: it must be less than --context {context}")
    if plot is not None and sweep is None:
        raise UserError(f"--plot {plot}: there is nothing to draw without --sweep")
    for other, given, value in (
        (sweep, "ttft-below", ttft_below),
        ("ranks", "cp", cp),
        ("miss-rates", "cached", cached),
    ):
        if sweep is not None and sweep == other and value:
            raise UserError(f"--{given}: --sweep {sweep} has no use for it; leave it out")
    notes: list[str] = []
    config, profile = find_shape(model, notes), _profile(hardware, find_profile)
    for note in notes:
        draw.say(note)
    shares.check(config, tp or 1)
    if dtype not in profile.linear_flops or dtype not in profile.attention_flops:
        raise UserError(
            f"--dtype {dtype}: {profile.name} has no rate for it; use one of "
            f"{', '.join(set(profile.linear_flops) & set(profile.attention_flops))}"
        )
    feed_forward = profile.feed_forward if fp8 is None else "float8" if fp8 else None
    if feed_forward and feed_forward not in profile.linear_flops:
        raise UserError(f"--fp8: {profile.name} has no FP8 rate; leave it out")
    if as_published and variant == "pass-q":
        variant = "pass-q-all2all"
    work = planner.Workload(
        config,
        context,
        cached,
        batch,
        answer,
        dtype,
        feed_forward,
        published=as_published,
        graphs=not eager,
    )
    ranks = max_gpus or max((cp or 1) * (tp or 1), profile.ranks_per_host or _here(profile))
    if sweep is not None:
        from cptool.cli import plot as plots
        from cptool.cli import sweeps

        plots.check(plot)
        table = sweeps.SWEEPS[sweep](work, cp, tp, variant, profile, ranks)
        if plot is not None:
            sweeps.draw_plot(table, model, profile.name, plot)
        sweeps.tell(table, model, profile.name, plot, as_json)
        return
    plans = [
        planner.plan(work, c, t, variant, profile)
        for c, t in planner.layouts(config, cp, tp, ranks)
    ]
    if not plans:
        raise UserError(
            f"--max-gpus {ranks}: no layout with "
            + " ".join(f"--{name} {n}" for name, n in (("cp", cp), ("tp", tp)) if n)
            + " has so few ranks; raise it"
        )
    fixed = [name for name, count in (("cp", cp), ("tp", tp)) if count]
    fp8_helps = feed_forward is None and "float8" in profile.linear_flops
    answer = planner.best(plans, ttft_below, fixed, fp8_helps)
    if as_json:
        click.echo(json.dumps(_fields(answer, work, model, profile, ttft_below)))
        return
    _draw(answer, work, model, profile, ttft_below)


def _profile(hardware: str | None, find_profile):
    if hardware is not None:
        return find_profile(hardware)
    from cptool.planning.profiles import is_measured

    return find_profile("measured" if is_measured() else "h100-sxm")


def _here(profile) -> int:
    return profile.ranks_at_once or 1


def _fields(answer, work, model, profile, ttft_below) -> dict:
    """What --json prints; seconds, milliseconds and bytes as the names say."""
    best = answer.best
    parts = best.ttft.parts
    return {
        "model": model,
        "hardware": profile.name,
        "context": work.context,
        "cached": work.cached,
        "batch": work.batch,
        "new": work.new,
        "model_context": work.config.max_position_embeddings,
        "cp": best.cp,
        "tp": best.tp,
        "gpus": best.ranks,
        "hosts": best.hosts,
        "dtype": work.dtype,
        "feed_forward": work.feed_forward or work.dtype,
        "variant": best.choice.variant,
        "active": best.choice.active,
        "reason": best.choice.reason,
        "ttft_s": best.ttft.seconds,
        "ttit_ms": 1e3 * best.ttit.seconds,
        "decode_variant": best.decode_choice.variant,
        "decode_reason": best.decode_choice.reason,
        **parts,
        "parts_s": parts,
        "parts_share": {name: spent / best.ttft.seconds for name, spent in parts.items()},
        "ttit_parts_ms": {name: 1e3 * spent for name, spent in best.ttit.parts.items()},
        "hidden_s": best.ttft.hidden_s,
        "wire_bytes": best.ttft.wire_bytes,
        "tensor_parallel_bytes": best.ttft.tensor_parallel_bytes,
        "memory_bytes_per_rank": round(best.memory_bytes),
        "memory_parts_bytes": {name: round(count) for name, count in best.memory.items()},
        "memory_capacity_bytes": round(best.capacity),
        "variants": [
            {"variant": name, "ttft_s": e.seconds, "exposed_s": e.exposed_s, "why": why}
            for name, e, why in _variants(best)
        ],
        "decode_variants": [
            {"variant": name, "ttit_ms": 1e3 * e.seconds, "exposed_ms": 1e3 * e.exposed_s}
            for name, e in sorted(best.other_steps.items(), key=lambda item: item[1].seconds)
        ],
        "target_ttft_s": ttft_below,
        "reaches_target": None if ttft_below is None else not answer.misses_target,
        "rejected": [
            {
                "cp": p.cp,
                "tp": p.tp,
                "gpus": p.ranks,
                "variant": p.choice.variant,
                "ttft_s": p.ttft.seconds,
                "ttit_ms": 1e3 * p.ttit.seconds,
                "memory_bytes_per_rank": round(p.memory_bytes),
                "why": why,
            }
            for p, why in answer.rejected
        ],
        "command": _command(best, work, model, profile),
    }


def _variants(best) -> list[tuple]:
    """(name, estimate, why) of every variant on the chosen layout, the fastest first."""
    rows = []
    for name, estimate in sorted(best.others.items(), key=lambda item: item[1].seconds):
        exposed = estimate.exposed_s
        why = f"{units.size(estimate.wire_bytes)} sent by a rank, "
        why += f"{duration(exposed)} exposed, {duration(estimate.hidden_s)} hidden"
        merging = estimate.parts["merge_s"]
        why += f", {duration(merging)} copying and merging"
        rows.append((name, estimate, why))
    return rows


def _command(best, work, model, profile) -> str:
    """What runs this plan: one command on one host, torchrun on each of several."""
    options = [f"--cp {best.cp}"] * (best.cp > 1) + [f"--tp {best.tp}"] * (best.tp > 1)
    options += [f"--variant {best.choice.variant}"] if best.choice.reason == "as asked" else []
    prompt = "--prompt-file PROMPT"
    named = "MODEL" if model in SHAPES or model.endswith(".json") else shlex.quote(model)
    what = f"prefill {named} {prompt} --session SESSION"
    if not work.cached:
        options.append(f"--dtype {work.dtype}")
    else:
        what = f"decode SESSION {prompt} -n {work.answer}"
    line = " ".join(["cptool", what, *options])
    if best.hosts == 1:
        return line
    each = best.ranks // best.hosts
    return (
        f"torchrun --nnodes {best.hosts} --nproc-per-node {each} --rdzv-backend c10d "
        f"--rdzv-endpoint HOST:29500 -m {line}   # or: srun --nodes {best.hosts} "
        f"--ntasks-per-node {each} {line}"
    )


def _draw(answer, work, model, profile, ttft_below) -> None:
    from cptool.planning.hardware import MEASURED

    best = answer.best
    hardware = profile.name.removeprefix(MEASURED)
    rows = [
        (
            "plan",
            f"{model} on {hardware}, {units.some(work.context, 'token')}"
            + f" ({work.cached:,} cached)" * bool(work.cached)
            + f" in each of {work.batch} sequences" * (work.batch > 1),
        ),
        (
            "layout",
            f"{best.cp} cp x {best.tp} tp, {units.some(best.ranks, 'rank')} on "
            f"{units.some(best.hosts, 'host')}, {work.dtype}"
            + ", feed-forward in FP8"
            * (work.feed_forward == "float8"),
        ),
        ("variant", f"{best.choice.variant} ({best.choice.reason})"),
        ("first token", duration(best.ttft.seconds) + _missed(answer, ttft_below)),
        ("", _shares(best.ttft.parts)),
    ]
    if best.cp > 1:
        rows.append(
            (
                "exchange",
                f"{units.size(best.ttft.wire_bytes)} sent by a rank, "
                f"{duration(best.ttft.exposed_s)} exposed, "
                f"{duration(best.ttft.hidden_s)} hidden under compute",
            )
        )
    rows += [
        (
            "each further",
            f"{duration(best.ttit.seconds)} ({_steps(best)})"
            + f", {work.answer:,} in {duration(work.answer * best.ttit.seconds)}"
            * bool(work.answer),
        ),
        ("", _shares(best.ttit.parts)),
        (
            "memory",
            f"{units.size(best.memory_bytes)} of {units.size(best.capacity)} a rank: "
            + ", ".join(f"{name} {units.size(count)}" for name, count in best.memory.items()),
        ),
    ]
    own = work.config.max_position_embeddings
    if work.context + work.answer > own:
        beyond = f"beyond the model's context of {own:,}: prefill and decode refuse it"
        rows.insert(1, ("", f"{beyond} without --context-length"))
    draw.table(rows)
    if best.cp > 1:
        click.echo("\nvariants on this layout")
        draw.table([(f"  {n} {duration(e.seconds)}", why) for n, e, why in _variants(best)])
    if answer.rejected:
        # What would run comes first, the fastest of it.
        others = sorted(answer.rejected, key=lambda r: (bool(r[0].excess_bytes), r[0].ttft.seconds))
        more = f" ({SHOWN} of {len(others)}, --json has all)" if len(others) > SHOWN else ""
        click.echo(f"\nother layouts{more}")
        draw.table(
            [
                (f"  {p.cp} cp x {p.tp} tp", f"{duration(p.ttft.seconds)}, {why}")
                for p, why in others[:SHOWN]
            ]
        )
    click.echo(f"\nrun it: {_command(best, work, model, profile)}")
    if work.feed_forward == "float8":
        click.echo(f"it computes all in {work.dtype}: the engine has no FP8 yet")


def _steps(best) -> str:
    """The variant that a decode step takes, and what others would."""
    others = (
        f"{name} {duration(e.seconds)}"
        for name, e in best.other_steps.items()
        if name != best.decode_choice.variant
    )
    return "; ".join([best.decode_choice.variant, ", ".join(others)]).removesuffix("; ")


def _missed(answer, ttft_below) -> str:
    if ttft_below is None:
        return ""
    if not answer.misses_target:
        return f", under the {duration(ttft_below)} asked for"
    return f"; no layout here reaches the {duration(ttft_below)} asked for, raise --max-gpus"


def _shares(parts: dict[str, float]) -> str:
    """The parts that count, the largest first."""
    whole = sum(parts.values())
    named = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(
        f"{name.removesuffix('_s').replace('_', ' ')} {duration(spent)} ({spent / whole:.0%})"
        for name, spent in named
        if spent > 0.005 * whole
    )
