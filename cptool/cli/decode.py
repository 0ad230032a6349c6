"""`cptool decode`: continue a session, with or without a next turn."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cptool.cli import draw, turn_report
from cptool.cli.answer_stream import AnswerStream
from cptool.cli.figures.tables import wide_option
from cptool.cli.json_output import print_object
from cptool.cli.options import completion
from cptool.cli.options.common import check_profile, json_option, moved_option, profile_option
from cptool.cli.options.models import (
    check_turn_room,
    context_option,
    open_model,
    say_reading,
    session_fields,
)
from cptool.cli.options.next_turn import NextTurn, next_turn
from cptool.cli.options.prompts import Prompts, check_context, prompt_options
from cptool.cli.options.ranks import RankRequest, attention_options, ranks_by_default
from cptool.cli.options.sampling import SamplingRequest, sampling_options
from cptool.engine.options import EngineOptions
from cptool.session import store as sessions

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.distributed.options import RankOptions
    from cptool.engine.turn import Report, Turn
    from cptool.session.manifest import Manifest

DEFAULT_TOKENS = 128


@click.command(short_help="Append tokens to a session, and save it.")
@click.argument("session", type=click.Path(path_type=Path), shell_complete=completion.sessions)
@prompt_options
@click.option(
    "--raw",
    is_flag=True,
    help="Append the prompt as it is, not in the conversation's chat template.",
)
@click.option(
    "-n",
    "--tokens",
    "count",
    type=click.IntRange(min=0),
    help=f"Append up to this many tokens.  [default: {DEFAULT_TOKENS}]",
)
@sampling_options
@moved_option
@profile_option
@ranks_by_default(
    "the session's last, or what the launcher started",
    "the session's last, or 1 with --cp or a launcher",
)
@attention_options
@context_option
@json_option
@wide_option
def decode(
    session: Path,
    asked: Prompts,
    raw: bool,
    count: int | None,
    sampler: SamplingRequest,
    model: str | None,
    profile: str | None,
    ranks: RankRequest,
    attention: EngineOptions,
    context_length: int | None,
    as_json: bool,
) -> None:
    """Append tokens to a SESSION that `cptool prefill --session` made, and save it.

    With prompt options, one for each sequence, their tokens are the next turn and are read first.
    In a conversation (prefill --chat), texts are messages in the model's chat template; one that
    follows a message without an answer, such as a document, joins it.
    A sequence whose answer has ended gets no tokens until it is given a next turn. Without --cp
    and --tp, as many ranks as last time.
    """
    from cptool.cli.launch import check_whole, run_turn
    from cptool.engine.turn import Turn

    check_profile(profile)
    manifest = sessions.load(session)
    sessions.check_writable(session)
    checkpoint = open_model(model or sessions.model_path(manifest), context_length)
    sampling = sampler.resolve(checkpoint)
    say_reading(checkpoint)
    sessions.check_model(manifest, sessions.identity(checkpoint))
    following = next_turn(session, manifest, checkpoint, asked, raw=raw)
    turn = Turn(
        model=str(checkpoint.path),
        dtype=manifest.dtype,
        options=attention,
        max_new_tokens=_tokens_to_append(count, following, checkpoint),
        stop_ids=checkpoint.answer_ends(
            *(s.tokens for s in manifest.sequences), *following.prompts
        ),
        sampling=sampling,
        profile=profile,
        **following.fields(),
        **session_fields(session, manifest, checkpoint),
    )
    placed = ranks.or_as_last(manifest).resolve(checkpoint.config)
    _prepare(turn, placed, checkpoint, manifest)
    stream = None if as_json else _stream(turn, checkpoint)
    report = run_turn(turn, placed, emit=stream.emit if stream else None)
    if report is None:
        return
    if stream is not None:
        stream.finish()
    if as_json:
        print_object(_fields(report, turn, checkpoint))
    else:
        if stream is None:
            _print_answers(report, checkpoint)
        check_whole(report, turn)
        _draw(report, turn, checkpoint, sampler.describe(sampling))
    check_whole(report, turn)


def _prepare(turn: Turn, ranks: RankOptions, checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Check that the turn can be saved, and print what it is predicted to take."""
    check_turn_room(turn, checkpoint.config)
    turn_report.say_prediction(turn, ranks, [s.cached for s in manifest.sequences])


def _stream(turn: Turn, checkpoint: Checkpoint) -> AnswerStream | None:
    """Return what writes the answer as it comes, None for a batch or without a tokenizer."""
    tokenizer = checkpoint.tokenizer()
    return AnswerStream(tokenizer) if len(turn.prompts) == 1 and tokenizer is not None else None


def _tokens_to_append(count: int | None, following: NextTurn, checkpoint: Checkpoint) -> int:
    """Return `count`, or by default what the context has room for, up to DEFAULT_TOKENS.

    Raises UserError if the context has no room for the new tokens.
    """
    held, lengths = list(following.keep), list(map(len, following.prompts))
    if count is None:
        longest = max(h + n for h, n in zip(held, lengths, strict=True))
        room = checkpoint.config.max_position_embeddings - longest
        count = max(1, min(DEFAULT_TOKENS, room))
    check_context(lengths, held, count, checkpoint.config)
    return count


def _texts(report: Report, checkpoint: Checkpoint) -> list[str | None]:
    """Return the answers as text, None without a tokenizer."""
    tokenizer = checkpoint.tokenizer()
    return [tokenizer.decode(list(ids)) if tokenizer else None for ids in report.token_ids]


def _fields(report: Report, turn: Turn, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what --json prints."""
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
        **report.predicted.fields(decoding=True),
        "token_ids": [list(ids) for ids in report.token_ids],
        "text": _texts(report, checkpoint),
        "stopped": list(report.stopped),
        "session": turn.session,
        **turn_report.profile_fields(report),
    }


def _print_answers(report: Report, checkpoint: Checkpoint) -> None:
    """Print one line per sequence: its answer as text, or as token ids without a tokenizer."""
    answers = zip(report.token_ids, _texts(report, checkpoint), strict=True)
    for b, (ids, text) in enumerate(answers, 1):
        click.echo(f"[{b}] {text if text is not None else ' '.join(map(str, ids))}")


def _draw(report: Report, turn: Turn, checkpoint: Checkpoint, sampling: str) -> None:
    """Print a table on standard error: what was done, and how tokens were sampled."""
    for b, ids in enumerate(report.token_ids, 1):
        if turn.max_new_tokens and not ids:
            draw.say(
                f"sequence {b}: its answer has ended; give it a next turn, as with --prompt",
                always=True,
            )
    tokenizer = checkpoint.tokenizer()
    for ids in report.token_ids:
        if tokenizer is not None and len(ids) == 1 and ids[0] in turn.stop_ids:
            draw.say(f"the answer ended at its first token ({tokenizer.spelling(ids[0])})")
    rows = turn_report.prefill_rows(report) if report.tokens else []
    rows += [*turn_report.decode_rows(report), *turn_report.source_rows(report)]
    if turn.max_new_tokens:
        rows.append(("sampling", sampling))
    draw.table(rows, to_stderr=True)
    turn_report.phases(report, turn.profile, to_stderr=True)
    if sys.stdout is not None:  # closed from the beginning
        sys.stdout.flush()
