"""`cptool prefill`: compute the KV of a prompt, report the first token and its time, and keep the
KV on request.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from cptool.cli import draw, turn_report, verbosity
from cptool.cli.figures.tables import wide_option
from cptool.cli.json_output import print_object
from cptool.cli.options import completion
from cptool.cli.options.common import check_profile, dtype_option, json_option, profile_option
from cptool.cli.options.examples import examples
from cptool.cli.options.models import context_option, open_model
from cptool.cli.options.next_turn import begun
from cptool.cli.options.prompts import Prompts, chat_prompt_options
from cptool.cli.options.ranks import RankRequest, attention_options, ranks_by_default
from cptool.cli.progress_lines import progress_option
from cptool.cli.turns import SessionRequest, session_options
from cptool.engine.options import EngineOptions
from cptool.engine.setup.types import setup_types
from cptool.model.context import check_context

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.engine.turn import Report, Turn


@click.command(
    epilog=examples(
        "cptool prefill MODEL --chat --prompt-file doc.txt --session s --cp 2",
        "cptool prefill MODEL --synthetic 8K --cp 2 --profile trace.json",
    ),
)
@click.argument("model", shell_complete=completion.models)
@chat_prompt_options
@session_options
@profile_option
@ranks_by_default("1, or what the launcher started")
@attention_options
@context_option
@dtype_option
@json_option
@progress_option
@wide_option
def prefill(
    model: str,
    asked: Prompts,
    kept: SessionRequest,
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

    if not asked:
        raise click.UsageError(
            "no prompt; give --prompt, --prompt-file, --token-ids or --synthetic"
        )
    check_profile(profile)
    manifest = kept.open()
    checkpoint = open_model(model, context_length)
    prompts = asked.read(checkpoint, begin=True)
    lengths = [len(prompt.tokens) for prompt in prompts]
    check_context(lengths, [0] * len(lengths), 0, checkpoint.config)
    placed = ranks.resolve(checkpoint.config)
    turn = kept.turn(
        manifest,
        checkpoint,
        prompts,
        **setup_types(dtype, attention, checkpoint, placed.device, held=(kept.directory, manifest)),
        profile=profile,
        chat=begun(prompts, asked, kept.directory, manifest),
    )
    turn_report.say_what_comes(turn, placed, manifest)
    report = run_turn(turn, placed)
    if report is None:
        return
    if as_json:
        print_object(_fields(report, lengths, turn.session))
    else:
        _draw(report, turn, checkpoint)


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
    """Print a table of what was done, and of the profile if there is one; with -q, the results."""
    tokenizer = checkpoint.tokenizer()
    named = [repr(tokenizer.decode([t])) if tokenizer else f"id {t}" for t in report.first_token]
    rows = []
    if not verbosity.quiet():
        rows += [*turn_report.prefill_rows(report), *turn_report.source_rows(report)]
    rows.append(("next token", ", ".join(named)))
    if turn.session is not None:
        question = "" if turn.chat is None else ' --prompt "..."'
        command = f"cptool decode {shlex.quote(turn.session)}{question}"
        rows.append(("session", f"{turn.session}; continue with: {command}"))
    draw.table(rows)
    turn_report.phases(report, turn.profile)
