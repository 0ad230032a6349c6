"""What a turn did, as rows of a table, fields of JSON, and the phases of a profile."""

from typing import TYPE_CHECKING, Protocol

from cptool.cli import verbosity
from cptool.cli.draw import Rows, say
from cptool.cli.figures import tables
from cptool.cli.figures.tables import Column
from cptool.distributed.environment import is_first_rank, launched_size
from cptool.planning.cost.memory import in_words
from cptool.units import byte_rate, duration, flop_rate, percent, size, some, token_rate

if TYPE_CHECKING:
    from cptool.distributed.options import RankOptions
    from cptool.engine.setup.memory import Used
    from cptool.engine.turn import Report, Turn
    from cptool.session.manifest import Manifest


class Typed(Protocol):
    """What computes in one type and stores KV and weights in others."""

    @property
    def dtype(self) -> str: ...
    @property
    def kv_dtype(self) -> str: ...
    @property
    def weights(self) -> str: ...


_SHARED = 0.05
"""The part of the time to the first token from which on sharing processors is worth a row."""


def say_what_comes(turn: "Turn", ranks: "RankOptions", manifest: "Manifest | None") -> None:
    """Print what the session has of the turn already, because a run of it was interrupted, and what
    is predicted (`_say_prediction`).
    """
    from cptool.session.unfinished import taken

    resumed = 0 if manifest is None else taken(manifest, turn.keep, turn.prompts)
    if resumed and is_first_rank():
        whole = some(sum(map(len, turn.prompts)), "token")
        say(f"{turn.session} has {resumed:,} of the {whole} of this prompt; going on from there")
    _say_prediction(turn, ranks, manifest)


def _say_prediction(turn: "Turn", ranks: "RankOptions", manifest: "Manifest | None") -> None:
    """Print what the turn is predicted to take, where the cost model covers it, to a user who waits
    at a terminal, or with -v.

    manifest: of the session that the turn continues. Under a launcher the ranks may be on several
    machines, whose profile is known only to them; nothing is printed then.
    """
    if launched_size() is not None or not (verbosity.draws_bars() or verbosity.verbose()):
        return
    from cptool.checkpoint import open_checkpoint
    from cptool.engine.figures import expected

    found = expected(turn, open_checkpoint(turn.model), ranks, manifest)
    parts = []
    if found.ttft_s is not None:
        parts.append(f"{duration(found.ttft_s)} to the first token")
    if found.ttit_s is not None:
        parts.append(
            f"{duration(found.ttit_s)} for each further {_step(turn.samples * len(turn.prompts))}"
        )
    if parts:
        say(f"predicted: {', '.join(parts)} ({found.source})")


def _step(batch: int) -> str:
    return "token" if batch == 1 else "step of the batch"


def _beside(predicted_s: float | None) -> str:
    """Return what stands beside a measured time: the predicted one, where there is one."""
    return "" if predicted_s is None else f" (predicted {duration(predicted_s)})"


def types_of(run: Typed) -> str:
    """Return the dtype of the products, that of KV if it is another one, and whether weights were
    quantised.
    """
    kv = f", KV in {run.kv_dtype}" if run.kv_dtype != run.dtype else ""
    weights = "" if run.weights == "file" else f", weights quantised to {run.weights}"
    return f"{run.dtype}{kv}{weights}"


def prefill_rows(report: "Report") -> Rows:
    """Return rows on what a prefill did, which variant it chose and what rate it reached."""
    after = f" after {report.cached:,} cached" if report.cached else ""
    if report.resumed:
        after += f", {report.resumed:,} of them of this prompt, from a run that was interrupted"
    rows = [
        ("prompt", some(report.tokens, "token") + after),
        ("ranks", f"{report.cp} cp x {report.tp} tp on {report.device}, {types_of(report)}"),
        *([("weights", report.widened)] if report.widened else []),
        *_chunk_rows(report),
        *_file_rows(report),
        ("variant", f"{report.variant or 'none'} ({report.reason})"),
        (
            "first token",
            f"{duration(report.ttft_s)}{_beside(report.predicted.ttft_s)}, "
            f"{token_rate(report.tokens / report.ttft_s)}, "
            f"{flop_rate(report.flops / report.ttft_s)} on all ranks together",
        ),
        *_sharing_rows(report),
        ("loading", f"{duration(report.load_s)} for the weights"),
        ("memory", _memory(report.memory)),
    ]
    if report.cp > 1:
        exposed = f"{duration(report.exposed_s)} exposed"
        if tables.room() or tables.room(to_stderr=True):  # a person reads it
            exposed += " (ranks stood waiting for messages)"
        rows.append(("exchange", f"{size(report.wire_bytes)} sent per rank, {exposed}"))
    return rows


def _memory(used: "Used") -> str:
    """Return the most that a rank held, beside what was planned, by use."""
    planned = f"planned {size(used.predicted)}: {in_words(used.parts)}"
    return f"{size(used.peak)} per rank at most ({planned})"


def _chunk_rows(report: "Report") -> Rows:
    """Return a row on the chunks in which the prompt was read, if it was not in one piece."""
    if report.chunks < 2:
        return []
    shown = f"{report.chunks:,} of up to {some(report.chunk, 'token')}"
    if len(report.variants) > 1:
        each = ", ".join(f"{n:,} by {variant}" for variant, n in report.variants.items())
        shown += f": {each}; below, the last"
    return [("chunks", shown)]


def _file_rows(report: "Report") -> Rows:
    """Return a row on KV that is not in memory, if there is any."""
    if not report.kv_in_file:
        return []
    return [("KV", f"{size(report.kv_in_file)} per rank in a file, which each further token reads")]


def _sharing_rows(report: "Report") -> Rows:
    """Return a row on other programs that had the ranks' processors, if that made a difference."""
    waited = report.processor_wait_s
    if waited < _SHARED * report.ttft_s:
        return []
    part = percent(waited / report.ttft_s)
    return [
        (
            "processors",
            f"shared: for {part} of that time ({duration(waited)}) a rank was ready to compute "
            f"while other programs had its processor",
        )
    ]


def decode_rows(report: "Report") -> Rows:
    """Return rows on what a decode did and reached; none if no further token was computed."""
    if report.ttit_ms is None or report.tokens_per_s is None:
        return []
    count, batch = sum(map(len, report.token_ids)), len(report.token_ids)
    step_s = report.ttit_ms / 1e3
    read_s = step_s * (max(map(len, report.token_ids)) - 1) / max(1, report.drafts.steps)
    if batch == 1:
        each = f"{duration(step_s)} each{_beside(report.predicted.ttit_s)}"
    else:
        each = (
            f"{duration(step_s)} per step of {batch} sequences{_beside(report.predicted.ttit_s)}, "
            f"{duration(1 / report.tokens_per_s)} per token"
        )
    return [
        (
            "decode",
            f"{some(count, 'token')}, {each}, {token_rate(report.tokens_per_s)}, "
            f"{byte_rate(report.decode_bytes / read_s)} of weights and KV per rank",
        ),
        ("", f"{report.decode_variant} ({report.decode_reason})"),
        *_draft_rows(report),
    ]


def _draft_rows(report: "Report") -> Rows:
    """Return a row on drafts, if they were requested."""
    drafts = report.drafts
    if drafts.asked == "off" or (drafts.asked == "auto" and drafts.off):
        return []
    if drafts.off:
        return [("drafts", f"none: {drafts.off}")]
    each = drafts.tokens_per_step(report.token_ids) or 0.0
    shown = f"{drafts.accepted:,} of {some(drafts.proposed, 'token')} came true, {each:.2f} "
    return [("drafts", f"{shown}tokens per step of {some(drafts.steps, 'step')}")]


def source_rows(report: "Report") -> Rows:
    """Return a row on where the predictions come from; none if there are none."""
    predicted = report.predicted
    if predicted.ttft_s is None and predicted.ttit_s is None:
        return []
    remedy = "" if predicted.calibrated else "; measure this machine with: cptool bench calibrate"
    return [("predictions", predicted.source + remedy)]


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
