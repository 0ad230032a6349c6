"""`cptool decode`: continue a session, with or without a next turn."""

from __future__ import annotations

from pathlib import Path

import click

from cptool.cli.answers.output import OutputRequest, output_options
from cptool.cli.answers.run import run_and_write
from cptool.cli.figures.tables import wide_option
from cptool.cli.options import completion
from cptool.cli.options.answering import AnswerRequest, answering_options
from cptool.cli.options.common import check_profile, moved_option, profile_option
from cptool.cli.options.examples import examples
from cptool.cli.options.lengths import tokens_option, tokens_to_append
from cptool.cli.options.models import (
    check_turn_room,
    context_option,
    open_model,
    say_reading,
    session_fields,
)
from cptool.cli.options.next_turn import next_turn
from cptool.cli.options.prompts import Prompts, prompt_options
from cptool.cli.options.ranks import RankRequest, attention_options, ranks_by_default
from cptool.cli.options.sampling import SamplingRequest, sampling_options
from cptool.cli.progress_lines import progress_option
from cptool.cli.turns import save_every_option
from cptool.engine.options import EngineOptions
from cptool.engine.setup.types import setup_types
from cptool.session import store as sessions
from cptool.session import unfinished

DEFAULT_TOKENS = 128


@click.command(
    short_help="Append tokens to a session, and save it.",
    epilog=examples(
        'cptool decode s --prompt "What is the cat\'s name?"',
        "cptool decode s -n 200 --temperature 0.7 --top-p 0.9",
        "cptool decode s --cp 4 --json",
    ),
)
@click.argument("session", type=click.Path(path_type=Path), shell_complete=completion.sessions)
@prompt_options
@click.option(
    "--raw",
    is_flag=True,
    help="Append the prompt as it is, not in the conversation's chat template.",
)
@tokens_option(DEFAULT_TOKENS, least=0)
@sampling_options
@answering_options
@save_every_option
@moved_option
@profile_option
@ranks_by_default(
    "the session's last, or what the launcher started",
    "the session's last, or 1 with --cp or a launcher",
)
@attention_options
@context_option
@output_options
@progress_option
@wide_option
def decode(
    session: Path,
    asked: Prompts,
    raw: bool,
    count: int | None,
    sampler: SamplingRequest,
    wanted: AnswerRequest,
    save_every: float,
    model: str | None,
    profile: str | None,
    ranks: RankRequest,
    attention: EngineOptions,
    context_length: int | None,
    output: OutputRequest,
) -> None:
    """Append tokens to a SESSION that `cptool prefill --session` made, and save it.

    With prompt options, one for each sequence, their tokens are the next turn and are read first.
    In a conversation (prefill --chat), texts are messages in the model's chat template; one that
    follows a message without an answer, such as a document, joins it.
    A sequence whose answer has ended gets no tokens until it is given a next turn. Without --cp
    and --tp, as many ranks as last time.
    """
    from cptool.engine.turn import Turn

    output.check()
    check_profile(profile)
    manifest = sessions.load(session)
    unfinished.check_begun(session, manifest)
    sessions.check_writable(session)
    checkpoint = open_model(model or sessions.model_path(manifest), context_length)
    sampling = sampler.resolve(checkpoint)
    say_reading(checkpoint)
    sessions.check_model(manifest, sessions.identity(checkpoint))
    following = next_turn(session, manifest, checkpoint, asked, raw=raw)
    placed = ranks.or_as_last(manifest).resolve(checkpoint.config)
    turn = Turn(
        model=str(checkpoint.path),
        **setup_types("auto", attention, checkpoint, placed.device, held=(session, manifest)),
        max_new_tokens=tokens_to_append(
            count, DEFAULT_TOKENS, checkpoint.config, new=following.prompts, held=following.keep
        ),
        stop_ids=checkpoint.answer_ends(
            *(s.tokens for s in manifest.sequences), *following.prompts
        ),
        sampling=sampling,
        profile=profile,
        save_every=save_every,
        **wanted.fields(checkpoint),
        **following.fields(),
        **session_fields(session, manifest, checkpoint),
    )
    check_turn_room(turn, checkpoint.config)
    run_and_write(
        turn,
        placed,
        output,
        tokenizer=checkpoint.tokenizer(),
        prompts=turn.prompts,
        after=following.before_answers(manifest.sequences),
        manifest=manifest,
        sampling=sampler.describe(sampling),
    )
