"""What a turn did, as rows of a table, fields of JSON, and the phases of a profile."""

from typing import TYPE_CHECKING

from cptool.cli import verbosity
from cptool.cli.draw import Rows, say
from cptool.cli.figures import tables
from cptool.cli.figures.tables import Column
from cptool.units import byte_rate, duration, flop_rate, size, some, token_rate

if TYPE_CHECKING:
    from cptool.engine.turn import Report


def prefill_rows(report: "Report") -> Rows:
    """Return rows on what a prefill did, which variant it chose and what rate it reached."""
    rows = [
        (
            "prompt",
            some(report.tokens, "token")
            + (f" after {report.cached:,} cached" if report.cached else ""),
        ),
        ("ranks", f"{report.cp} cp x {report.tp} tp on {report.device}, {report.dtype}"),
        ("variant", f"{report.variant or 'none'} ({report.reason})"),
        (
            "first token",
            f"{duration(report.ttft_s)}, {token_rate(report.tokens / report.ttft_s)}, "
            f"{flop_rate(report.flops / report.ttft_s)} on all ranks together (weights loaded in "
            f"{duration(report.load_s)})",
        ),
    ]
    if report.cp > 1:
        rows.append(
            (
                "exchange",
                f"{size(report.wire_bytes)} sent per rank, {duration(report.exposed_s)} exposed",
            )
        )
    return rows


def decode_rows(report: "Report") -> Rows:
    """Return rows on what a decode did and reached; none if no further token was computed."""
    if report.ttit_ms is None:
        return []
    count = sum(map(len, report.token_ids))
    step_s = report.ttit_ms / 1e3
    each = f"{duration(step_s)} each"
    if len(report.token_ids) > 1:
        each = f"{duration(step_s)} per step of the batch"
    return [
        (
            "decode",
            f"{some(count, 'token')}, {each}, {byte_rate(report.decode_bytes / step_s)} of "
            "weights and KV per rank",
        ),
        ("", f"{report.decode_variant} ({report.decode_reason})"),
    ]


def profile_fields(report: "Report") -> dict[str, object]:
    """Return the profile for --json: seconds by phase, one per rank; empty without a profile."""
    if not report.phases:
        return {}
    return {"profile": {phases.name.partition(",")[0]: phases.fields() for phases in report.phases}}


def phases(report: "Report", path: str | None, *, to_stderr: bool = False) -> None:
    """Print where the time of each rank went, if there is a profile."""
    if to_stderr and verbosity.quiet():
        return
    for part in report.phases:
        ranks = len(part.wall_s)
        shown = range(ranks) if ranks <= 8 else ()
        wall = sum(part.wall_s) / ranks
        named = [(PHASE_NAMES.get(name, name), values) for name, values in part.phases.items()]
        named += [("wall", part.wall_s), ("(communication hidden)", part.hidden_s)]
        rows = [
            (
                name,
                duration(sum(values) / ranks),
                f"{sum(values) / ranks / wall:.1%}",
                *(duration(values[r]) for r in shown),
            )
            for name, values in named
        ]
        columns = (
            Column(name="phase", left=True),
            Column(name="mean"),
            Column(name="of wall"),
            *(Column(name=f"rank {r}", rank=1) for r in shown),
        )
        tables.show(columns, rows, title=part.name, to_stderr=to_stderr)
    if report.phases:
        say(f"trace: {path} (open it in ui.perfetto.dev)")


PHASE_NAMES = {
    "exposed": "communication exposed",
    "host": "host (no operation)",
    "idle": "idle (no kernel)",
}
