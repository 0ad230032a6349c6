"""What `cptool plan` prints of the plan that it found."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

import click

from cptool import units
from cptool.cli import draw
from cptool.cli.draw import Rows
from cptool.cli.figures import tables, wrapping
from cptool.cli.plan import chunks
from cptool.cli.plan.search import Search
from cptool.model.shapes import SHAPES
from cptool.planning.chunks import Chunks
from cptool.planning.cost.memory import in_words
from cptool.planning.hardware import MEASURED
from cptool.planning.planner import Answer, Plan, Workload
from cptool.planning.profiles import DEFAULTS
from cptool.units import duration

SHOWN = 10


@dataclass(frozen=True)
class Report:
    """The answer to a search; `target` is the time to the first token that was requested."""

    search: Search
    answer: Answer
    target: float | None

    def fields(self) -> dict[str, Any]:
        """Return what --json prints; seconds, milliseconds and bytes as the names say."""
        work, best = self.search.work, self.answer.best
        measured = self.search.profile.measurement
        return {
            "model": self.search.model,
            "hardware": self.search.profile.name,
            "calibrated": measured.date if measured else None,
            "context": work.context,
            "cached": work.cached,
            "batch": work.batch,
            "new": work.new,
            "model_context": work.config.max_position_embeddings,
            **_layout_fields(best),
            "hosts": best.hosts,
            "dtype": work.dtype,
            "kv_dtype": work.kv_dtype or work.dtype,
            "weights": work.weights,
            "feed_forward": work.feed_forward or work.dtype,
            "rule": work.rule,
            "active": best.choice.active,
            "reason": best.choice.reason,
            "decode_variant": best.decode_choice.variant,
            "decode_reason": best.decode_choice.reason,
            **_time_fields(best),
            **chunks.fields(best.ttft),
            "memory_parts_bytes": {name: round(count) for name, count in best.memory.items()},
            "memory_capacity_bytes": round(best.capacity),
            "target_ttft_s": self.target,
            "reaches_target": None if self.target is None else not self.answer.misses_target,
            "rejected": [{**_layout_fields(p), "why": why} for p, why in self.answer.rejected],
            "command": "   # or: ".join(self._commands()),
        }

    def draw(self) -> None:
        """Print the plan, the variants on its layout, and the other layouts."""
        best, work = self.answer.best, self.search.work
        draw.table(self._rows())
        if best.cp > 1:
            click.echo("\nvariants on this layout")
            draw.table([(f"  {n} {duration(e.seconds)}", why) for n, e, why in _variants(best)])
        if self.answer.rejected:
            # First what would run, the fastest of it first.
            others = sorted(
                self.answer.rejected, key=lambda r: (bool(r[0].excess_bytes), r[0].ttft.seconds)
            )
            more = f" ({SHOWN} of {len(others)}, --json has all)" if len(others) > SHOWN else ""
            click.echo(f"\nother layouts{more}")
            draw.table(
                [
                    (f"  {p.cp} cp x {p.tp} tp", f"{duration(p.ttft.seconds)}, {why}")
                    for p, why in others[:SHOWN]
                ]
            )
        click.echo("\nrun it:")
        width = tables.room()
        for number, command in enumerate(self._commands()):
            if number:
                click.echo("  # or:")
            for line in wrapping.continued(command, width - 2) if width else [command]:
                click.echo(f"  {line}")
        if work.feed_forward == "float8":
            click.echo(f"it computes everything in {work.dtype}: the engine has no FP8 yet")

    def _rows(self) -> Rows:
        best, work = self.answer.best, self.search.work
        rows = [
            ("plan", self._run()),
            *self._beyond_context(),
            ("layout", _layout(best, work)),
            *chunks.rows(best.ttft),
            ("variant", chunks.variants(best.ttft)),
            ("first token", duration(best.ttft.seconds) + self._missed()),
            ("", _shares(best.ttft.parts)),
        ]
        if best.cp > 1:
            rows.append(
                (
                    "exchange",
                    f"{units.size(best.ttft.wire_bytes)} sent per rank, "
                    f"{_moved(best.ttft, ' under compute')}",
                )
            )
            if tables.room():  # a person reads it
                rows.append(("", "exposed: ranks stand waiting for messages"))
        all_tokens = (
            f", {work.answer:,} in {duration(work.answer * best.ttit.seconds)}"
            if work.answer
            else ""
        )
        return [
            *rows,
            ("each further", f"{duration(best.ttit.seconds)} ({_steps(best)}){all_tokens}"),
            ("", _shares(best.ttit.parts)),
            (
                "memory",
                f"{units.size(best.memory_bytes)} of {units.size(best.capacity)} per rank: "
                f"{in_words(best.memory)}",
            ),
        ]

    def _run(self) -> str:
        work = self.search.work
        profile = self.search.profile
        line = f"{self.search.model} on {profile.name.removeprefix(MEASURED)}"
        if profile.measurement or profile.name in DEFAULTS:
            line += f" ({profile.source})"
        line += ", "
        line += units.some(work.context, "token")
        if work.cached:
            line += f" ({work.cached:,} cached)"
        return line + f" in each of {work.batch} sequences" * (work.batch > 1)

    def _beyond_context(self) -> Rows:
        """Return a row where the workload is longer than the model's own context."""
        work = self.search.work
        own = work.config.max_position_embeddings
        if work.context + work.answer <= own:
            return []
        beyond = f"beyond the model's context of {own:,}: prefill and decode refuse it"
        return [("", f"{beyond} without --context-length")]

    def _missed(self) -> str:
        """Return what the table says of the requested time to the first token."""
        if self.target is None:
            return ""
        target = duration(self.target)
        if not self.answer.misses_target:
            return f", below the target of {target}"
        return f"; no layout here reaches the target of {target}, raise --max-gpus"

    def _commands(self) -> list[str]:
        """Return what runs this plan: one command on one host; on several, torchrun on each, or
        srun.
        """
        best, work, model = self.answer.best, self.search.work, self.search.model
        options = [f"--cp {best.cp}"] * (best.cp > 1) + [f"--tp {best.tp}"] * (best.tp > 1)
        if best.choice.reason == "as asked":
            options.append(f"--variant {best.choice.variant}")
        if len(best.ttft.chunks) > 1:
            options.append(f"--chunk {best.ttft.chunks[0].new}")
        prompt = "--prompt-file PROMPT"
        named = "MODEL" if model in SHAPES or model.endswith(".json") else shlex.quote(model)
        what = f"prefill {named} {prompt} --session SESSION"
        if work.cached:
            what = f"decode SESSION {prompt} -n {work.answer}"
        else:
            options.append(f"--dtype {work.dtype}")
            if work.kv_dtype not in (None, work.dtype):
                options.append(f"--kv-dtype {work.kv_dtype}")
            if work.weights != "file":
                options.append(f"--weights {work.weights}")
        if self._beyond_context():
            options.append(f"--context-length {work.context + work.answer}")
        line = " ".join(["cptool", what, *options])
        if best.hosts == 1:
            return [line]
        each = best.ranks // best.hosts
        return [
            f"torchrun --nnodes {best.hosts} --nproc-per-node {each} --rdzv-backend c10d "
            f"--rdzv-endpoint HOST:29500 -m {line}",
            f"srun --nodes {best.hosts} --ntasks-per-node {each} {line}",
        ]


def _layout_fields(plan: Plan) -> dict[str, Any]:
    """Return what JSON says of each layout."""
    return {
        "cp": plan.cp,
        "tp": plan.tp,
        "gpus": plan.ranks,
        "variant": plan.choice.variant,
        "ttft_s": plan.ttft.seconds,
        "ttit_ms": 1e3 * plan.ttit.seconds,
        "memory_bytes_per_rank": round(plan.memory_bytes),
    }


def _time_fields(best: Plan) -> dict[str, Any]:
    """Return the parts of the times, and the times of the other variants on the same layout."""
    parts = best.ttft.parts
    return {
        **parts,
        "parts_s": parts,
        "parts_share": {
            name.removesuffix("_s"): spent / best.ttft.seconds for name, spent in parts.items()
        },
        "ttit_parts_ms": {
            name.removesuffix("_s"): 1e3 * spent for name, spent in best.ttit.parts.items()
        },
        "hidden_s": best.ttft.hidden_s,
        "wire_bytes": best.ttft.wire_bytes,
        "tensor_parallel_bytes": best.ttft.tensor_parallel_bytes,
        "variants": [
            {"variant": name, "ttft_s": e.seconds, "exposed_s": e.exposed_s, "why": why}
            for name, e, why in _variants(best)
        ],
        "decode_variants": [
            {"variant": name, "ttit_ms": 1e3 * e.seconds, "exposed_ms": 1e3 * e.exposed_s}
            for name, e in sorted(best.other_steps.items(), key=lambda item: item[1].seconds)
        ],
    }


def _variants(best: Plan) -> list[tuple[str, Chunks, str]]:
    """(name, estimate, why) of every variant on the chosen layout, the fastest first."""
    rows = []
    for name, estimate in sorted(best.others.items(), key=lambda item: item[1].seconds):
        why = (
            f"{units.size(estimate.wire_bytes)} sent per rank, "
            f"{_moved(estimate)}, "
            f"{duration(estimate.parts['merge_s'])} copying and merging"
        )
        rows.append((name, estimate, why))
    return rows


def _moved(estimate: Chunks, where: str = "") -> str:
    """Return how long ranks wait for messages, and how much of them compute hides, if any."""
    exposed = f"{duration(estimate.exposed_s)} exposed"
    hidden = f", {duration(estimate.hidden_s)} hidden{where}" if estimate.hidden_s > 0 else ""
    return exposed + hidden


def _layout(best: Plan, work: Workload) -> str:
    fp8 = ", feed-forward in FP8" if work.feed_forward == "float8" else ""
    quantised = "" if work.weights == "file" else f", weights quantised to {work.weights}"
    kv = "" if work.kv_dtype in (None, work.dtype) else f", KV in {work.kv_dtype}"
    return (
        f"{best.cp} cp x {best.tp} tp, {units.some(best.ranks, 'rank')} on "
        f"{units.some(best.hosts, 'host')}, {work.dtype}{kv}{quantised}{fp8}"
    )


def _steps(best: Plan) -> str:
    """Return the variant of a decode step, and the times of the others."""
    others = (
        f"{name} {duration(e.seconds)}"
        for name, e in best.other_steps.items()
        if name != best.decode_choice.variant
    )
    return "; ".join([best.decode_choice.variant, ", ".join(others)]).removesuffix("; ")


def _shares(parts: dict[str, float]) -> str:
    """Return the parts that count, the largest first."""
    whole = sum(parts.values())
    named = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(
        f"{_part_name(name)} {duration(spent)} ({spent / whole:.0%})"
        for name, spent in named
        if spent > 0.005 * whole
    )


def _part_name(name: str) -> str:
    """Return what people read for a part of a time, such as `linear_s`."""
    return "fixed costs" if name == "once_s" else name.removesuffix("_s").replace("_", " ")
