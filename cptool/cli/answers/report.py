"""What a turn with answers did: fields of JSON, and a table on standard error."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cptool.checkpoint.tokenizer.stops import before_stop
from cptool.cli import draw, turn_report
from cptool.cli.answers import logprobs
from cptool.cli.answers.numbers import number, places
from cptool.cli.draw import Rows

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.engine.turn import Report, Turn


def has_ended(why: str) -> bool:
    """Return whether an answer that stopped so has ended, rather than been cut: then the next turn
    may go on with it.
    """
    return why == "eos"


def text(
    answer: Sequence[int],
    why: str,
    stop: Sequence[str],
    *,
    tokenizer: Tokenizer,
    after: Sequence[int],
) -> str:
    """Return the text of an answer that stopped so, up to the first stop text; see
    `Tokenizer.text`.
    """
    whole = tokenizer.text(answer, after, ended=has_ended(why))
    return before_stop(whole, stop) if why == "stop" else whole


def texts(
    report: Report, turn: Turn, tokenizer: Tokenizer | None, after: Sequence[Sequence[int]]
) -> list[str | None]:
    """Return the text of each answer, None without a tokenizer."""
    if tokenizer is None:
        return [None] * len(report.token_ids)
    return [
        text(ids, why, turn.stop_texts, tokenizer=tokenizer, after=before)
        for ids, why, before in zip(report.token_ids, report.stopped, after, strict=True)
    ]


def fields(
    report: Report, turn: Turn, tokenizer: Tokenizer | None, after: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Return what --json prints; `after` are the tokens that each answer goes on with."""
    return {
        "tokens": report.tokens,
        **report.shared_fields(),
        "decode_variant": report.decode_variant,
        "decode_reason": report.decode_reason,
        "sampling": asdict(turn.sampling),
        "load_s": report.load_s,
        "ttft_s": report.ttft_s,
        "ttit_ms": report.ttit_ms,
        "tokens_per_s": report.tokens_per_s,
        **report.drafts.fields(),
        "tokens_per_step": report.drafts.tokens_per_step(report.token_ids),
        **report.predicted.fields(decoding=True),
        "sequence": [b for b, _ in places(turn)],
        "sample": [s for _, s in places(turn)],
        "token_ids": [list(ids) for ids in report.token_ids],
        "text": texts(report, turn, tokenizer, after),
        "stopped": list(report.stopped),
        "session": turn.session,
        **logprobs.fields(report, turn),
        **turn_report.profile_fields(report),
    }


def answer_rows(report: Report, turn: Turn) -> Rows:
    """Return the row on why the answers ended; none without tokens to append."""
    if not turn.max_new_tokens:
        return []
    ends = Counter(report.stopped)
    named = {
        "eos": "by the model",
        "stop": "at a stop text",
        "length": f"at -n {turn.max_new_tokens:,}",
    }
    several = len(report.token_ids) > 1
    ended = "ended " + ", ".join(
        f"{count:,} " * several + named.get(why, why) for why, count in ends.items()
    )
    return [("answer", ended)]


def draw_table(report: Report, turn: Turn, tokenizer: Tokenizer | None, sampling: str) -> None:
    """Print a table on standard error: what was done, and how tokens were sampled."""
    for n, ids in enumerate(report.token_ids):
        if turn.max_new_tokens and not ids:
            draw.say(
                f"sequence {number(turn, n)}: its answer has ended; give it a next turn, as with "
                "--prompt",
                always=True,
            )
        elif len(ids) == 1 and ids[0] in turn.stop_ids:
            which = "the answer" if len(report.token_ids) == 1 else f"answer {number(turn, n)}"
            token = tokenizer.spelling(ids[0]) if tokenizer else f"id {ids[0]}"
            draw.say(f"{which} ended at its first token ({token})")
    rows = turn_report.prefill_rows(report) if report.tokens else []
    rows += turn_report.decode_rows(report)
    rows += [*answer_rows(report, turn), *turn_report.source_rows(report)]
    if turn.max_new_tokens:
        rows.append(("sampling", sampling))
    draw.table(rows, to_stderr=True)
    logprobs.show(report, turn, tokenizer)
    turn_report.phases(report, turn.profile, to_stderr=True)
    if sys.stdout is not None:  # closed from the beginning
        sys.stdout.flush()
