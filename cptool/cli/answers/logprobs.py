"""Log-probabilities of a turn's tokens: fields of JSON, and tables on standard error."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cptool.cli import draw
from cptool.cli.answers.numbers import number, places
from cptool.cli.figures import tables
from cptool.cli.figures.tables import Column
from cptool.units import some

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.engine.answers.records import Logprobs, TokenLogprob
    from cptool.engine.turn import Report, Turn

_MOST_ROWS = 200
"""A table of more tokens has the least likely of them alone."""

_SURPRISES = 20


def fields(report: Report, turn: Turn) -> dict[str, Any]:
    """Return the fields of JSON, none without a request."""
    found: dict[str, Any] = {}
    if report.logprobs is not None:
        found["logprobs"] = _lists(report.logprobs)
    if report.prompt_logprobs is not None:
        found["prompt_logprobs"] = _lists(report.prompt_logprobs)
        found["prompt_logprobs_from"] = _starts(turn)
    return found


def token_fields(score: TokenLogprob) -> dict[str, Any]:
    """Return the fields of the JSON of one token beside `token`."""
    return {name: value for name, value in score.fields().items() if name != "token"}


def say_cached(turn: Turn) -> None:
    """Say in one line which tokens have no log-probability, because they were read earlier."""
    starts = _starts(turn)
    if turn.prompt_logprobs is None or not any(starts):
        return
    counts = " and ".join(f"{start:,}" for start in starts)
    draw.say(
        f"log-probabilities are those of the prompt's new tokens; the {counts} tokens before them "
        "were read earlier",
        always=True,
    )


def show(report: Report, turn: Turn, tokenizer: Tokenizer | None) -> None:
    """Print a table of the tokens of each prompt, and of each answer, as far as was requested."""
    starts = _starts(turn)
    for b, start in enumerate(starts):
        of = f" {b + 1}" if len(starts) > 1 else ""
        if report.prompt_logprobs is not None:
            _table(f"prompt{of}", report.prompt_logprobs[b], start, tokenizer)
        for n, (prompt, _) in enumerate(places(turn)):
            if report.logprobs is not None and prompt == b:
                begin = start + len(turn.prompts[b])
                of = f" {number(turn, n)}" if len(report.logprobs) > 1 else ""
                _table(f"answer{of}", report.logprobs[n], begin, tokenizer)


def _table(
    name: str, scores: Sequence[TokenLogprob], start: int, tokenizer: Tokenizer | None
) -> None:
    """Print a table of tokens, the first of which is at position `start`."""
    known = [s.logprob for s in scores if s.logprob is not None]
    if not known:
        return
    numbered = list(enumerate(scores, start))
    mean = sum(known) / len(known)
    caption = f"{some(len(known), 'token')}: mean {mean:.4f}, perplexity {_power(-mean):.4g}"
    if len(numbered) > _MOST_ROWS:
        numbered = sorted(numbered, key=lambda pair: _or_zero(pair[1].logprob))[:_SURPRISES]
        caption += f"; above, the {_SURPRISES} least likely; --json has all"
    most = max(len(score.top) for _, score in numbered)
    columns = (
        Column(name="position"),
        Column(name="token", left=True),
        Column(name="logprob"),
        Column(name="p"),
        *(Column(name=_ordinal(n), rank=n, left=True) for n in range(1, most + 1)),
    )
    rows = [
        (
            f"{position:,}",
            _spelled(score.token, tokenizer),
            "" if score.logprob is None else f"{score.logprob:.4f}",
            "" if score.logprob is None else f"{100 * math.exp(score.logprob):.3g}%",
            *(f"{_spelled(token, tokenizer)} {value:.2f}" for token, value in score.top),
            *[""] * (most - len(score.top)),
        )
        for position, score in numbered
    ]
    tables.show(
        columns, rows, title=f"Log-probabilities of the {name}", caption=caption, to_stderr=True
    )


def _lists(scores: Logprobs) -> list[list[dict[str, object]]]:
    return [[score.fields() for score in each] for each in scores]


def _starts(turn: Turn) -> list[int]:
    """Return the position of the first new token of each sequence."""
    return list(turn.keep or [0] * len(turn.prompts))


def _spelled(token: int, tokenizer: Tokenizer | None) -> str:
    """Return a token's text in quotes; its number without a tokenizer."""
    if tokenizer is None:
        return str(token)
    text = tokenizer.decode([token], control=True)
    return repr(tokenizer.spelling(token) if "\ufffd" in text or not text else text)


def _power(exponent: float) -> float:
    """Return e to this power, infinity if it is too large for a number."""
    return math.exp(exponent) if exponent < math.log(sys.float_info.max) else math.inf


def _ordinal(n: int) -> str:
    return {1: "likeliest", 2: "2nd", 3: "3rd"}.get(n, f"{n}th")


def _or_zero(value: float | None) -> float:
    return 0.0 if value is None else value
