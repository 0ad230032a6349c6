"""`cptool prefill`: compute the KV of a prompt, report the first token and its time, and keep the
KV on request.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cptool.cli import draw, turn_report
from cptool.cli.figures.tables import wide_option
from cptool.cli.json_output import print_object
from cptool.cli.options import completion
from cptool.cli.options.common import check_profile, dtype_option, json_option, profile_option
from cptool.cli.options.models import (
    check_turn_room,
    context_option,
    open_model,
    say_reading,
    session_fields,
)
from cptool.cli.options.next_turn import begun
from cptool.cli.options.prompts import Prompts, chat_prompt_options, check_context
from cptool.cli.options.ranks import RankRequest, attention_options, ranks_by_default
from cptool.engine.options import EngineOptions, resolve_dtype
from cptool.errors import OptionError
from cptool.session import store as sessions

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.engine.turn import Report, Turn
    from cptool.session.manifest import Manifest


@click.command()
@click.argument("model", shell_complete=completion.models)
@chat_prompt_options
@click.option(
    "--session",
    type=click.Path(path_type=Path),
    shell_complete=completion.sessions,
    metavar="DIR",
    help="Keep the KV here; of a session that is here, compute only what the prompt adds.",
)
@click.option(
    "--rewind",
    is_flag=True,
    help="Where the prompt differs from the session, go back to what they have in common.",
)
@profile_option
@ranks_by_default("1, or what the launcher started")
@attention_options
@context_option
@dtype_option
@json_option
@wide_option
def prefill(
    model: str,
    asked: Prompts,
    session: Path | None,
    rewind: bool,
    profile: str | None,
    ranks: RankRequest,
    attention: EngineOptions,
    context_length: int | None,
    dtype: str,
    as_json: bool,
) -> None:
    """Compute the KV of a prompt and the token that follows it.

    MODEL is a directory in Hugging Face's layout or in Meta's, a .gguf file, a name known to
    `cptool pull`, or a hub id. Several prompts, by any of the prompt options, are a batch.
    """
    from cptool.cli.launch import run_turn
    from cptool.engine.turn import Turn

    _check_options(asked, session, rewind)
    check_profile(profile)
    manifest = None if session is None else _open_session(session, dtype)
    checkpoint = open_model(model, context_length)
    prompts = asked.read(checkpoint, begin=True)
    sequences = [prompt.tokens for prompt in prompts]
    lengths = list(map(len, sequences))
    check_context(lengths, [0] * len(lengths), 0, checkpoint.config)
    if session is not None:
        say_reading(checkpoint)
    keep = None
    if session is not None and manifest is not None:
        sessions.check_model(manifest, sessions.identity(checkpoint))
        keep = tuple(sessions.shared_prefixes(session, manifest, sequences, rewind))
        sequences = [tokens[n:] for tokens, n in zip(sequences, keep, strict=True)]
    placed = ranks.resolve(checkpoint.config)
    turn = Turn(
        model=str(checkpoint.path),
        prompts=tuple(map(tuple, sequences)),
        dtype=manifest.dtype if manifest else resolve_dtype(dtype, checkpoint, placed.device),
        options=attention,
        keep=keep,
        profile=profile,
        chat=begun(prompts, asked, session, manifest),
        **session_fields(session, manifest, checkpoint),
    )
    check_turn_room(turn, checkpoint.config)
    turn_report.say_prediction(turn, placed, keep or [0] * len(sequences))
    report = run_turn(turn, placed)
    if report is None:
        return
    if as_json:
        print_object(_fields(report, lengths, turn.session))
    else:
        _draw(report, turn, checkpoint)


def _check_options(asked: Prompts, session: Path | None, rewind: bool) -> None:
    if not asked:
        raise click.UsageError(
            "no prompt; give --prompt, --prompt-file, --token-ids or --synthetic"
        )
    if rewind and session is None:
        raise click.UsageError("--rewind: there is nothing to go back in; add --session DIR")


def _open_session(directory: Path, dtype: str) -> Manifest | None:
    """Return the manifest of the session there, None for a new one.

    Raises UserError if a turn could not be saved there, or its KV has another dtype.
    """
    sessions.check_writable(directory)
    if not sessions.exists(directory):
        sessions.check_new(directory)
        return None
    manifest = sessions.load(directory)
    if dtype not in ("auto", manifest.dtype):
        raise OptionError(
            "dtype",
            dtype,
            f"the KV of {directory} is {manifest.dtype}",
            "leave `dtype` out, or name a new directory",
        )
    return manifest


def _fields(report: Report, lengths: list[int], session: str | None) -> dict[str, Any]:
    """Return what --json prints."""
    return {
        "tokens": report.tokens,
        "tokens_per_sequence": lengths,
        **report.shared_fields(),
        "load_s": report.load_s,
        "ttft_s": report.ttft_s,
        **report.predicted.fields(decoding=False),
        "tflops": report.flops / report.ttft_s / 1e12,
        "exposed_s": report.exposed_s,
        "wire_bytes": report.wire_bytes,
        "first_token": list(report.first_token),
        "session": session,
        **turn_report.profile_fields(report),
    }


def _draw(report: Report, turn: Turn, checkpoint: Checkpoint) -> None:
    """Print a table of what was done, and of the profile if there is one."""
    tokenizer = checkpoint.tokenizer()
    named = [repr(tokenizer.decode([t])) if tokenizer else f"id {t}" for t in report.first_token]
    rows = [*turn_report.prefill_rows(report), *turn_report.source_rows(report)]
    rows.append(("continues", ", ".join(named)))
    if turn.session is not None:
        command = f"cptool decode {shlex.quote(turn.session)}"
        rows.append(("session", f"{turn.session}; continue with: {command}"))
    draw.table(rows)
    turn_report.phases(report, turn.profile)
