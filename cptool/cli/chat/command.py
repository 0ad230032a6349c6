"""`cptool chat`: a conversation at the terminal, its KV kept on the ranks between turns."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cptool.cli import draw
from cptool.cli.chat.lines import questions
from cptool.cli.chat.terminal import Answering, Terminal
from cptool.cli.options import completion
from cptool.cli.options.answering import AnswerRequest, stop_options
from cptool.cli.options.common import dtype_option, moved_option
from cptool.cli.options.examples import examples
from cptool.cli.options.models import context_option, open_model, say_reading, session_fields
from cptool.cli.options.ranks import RankRequest, attention_options, ranks_by_default
from cptool.cli.options.sampling import SamplingRequest, sampling_options
from cptool.cli.turn_report import types_of
from cptool.engine.options import EngineOptions
from cptool.engine.setup.types import setup_types
from cptool.errors import OptionError, UserError
from cptool.session import store as sessions
from cptool.session.conversation import Conversation
from cptool.session.unfinished import check_begun

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.session.manifest import Manifest

DEFAULT_TOKENS = 512


@click.command(
    short_help="Talk with a model, or continue a saved session.",
    epilog=examples(
        "cptool chat smollm2-135m-instruct",
        "cptool chat MODEL --file doc.txt --cp 2",
        "cptool chat s",
    ),
)
@click.argument("source", metavar="MODEL|SESSION", shell_complete=completion.models_or_sessions)
@click.option("--system", metavar="TEXT", help="A system message to begin with.")
@click.option(
    "--file",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="A text file that the first question is about; may be repeated.",
)
@click.option(
    "--paragraphs",
    is_flag=True,
    help="Part the questions of piped input by blank lines. Without it, each line is one.",
)
@click.option(
    "-n",
    "--tokens",
    "count",
    type=click.IntRange(min=1),
    default=DEFAULT_TOKENS,
    show_default=True,
    help="Answer with up to this many tokens.",
)
@sampling_options
@stop_options
@moved_option
@ranks_by_default("1, or the session's last", "1, or the session's last without --cp")
@attention_options
@context_option
@dtype_option
def chat(
    source: str,
    system: str | None,
    files: tuple[str, ...],
    paragraphs: bool,
    count: int,
    sampler: SamplingRequest,
    wanted: AnswerRequest,
    model: str | None,
    ranks: RankRequest,
    attention: EngineOptions,
    context_length: int | None,
    dtype: str,
) -> None:
    """Talk with a MODEL in its own chat template, or continue a SESSION.

    A session is one that /save, or prefill --chat, made; what is said is saved to it at the end.
    Only what a turn adds is computed. Where standard input is not a terminal, each line of it is a
    question, or with --paragraphs each paragraph. A text of several lines that is pasted at a
    terminal is one question. /help lists the commands.
    """
    from cptool.engine.resident import Resident
    from cptool.engine.setup.loading import Setup

    asked = questions(paragraphs=paragraphs)

    directory = Path(source) if sessions.exists(Path(source)) else None
    manifest = None if directory is None else sessions.load(directory)
    _check_options(source, manifest, system=system, model=model)
    moved = model or (sessions.model_path(manifest) if manifest else source)
    checkpoint = open_model(moved, context_length)
    sampling = sampler.resolve(checkpoint)
    wishes = wanted.in_chat(checkpoint)
    tokenizer = _find_tokenizer(checkpoint)
    conversation = _begin(tokenizer, system)
    if directory is not None and manifest is not None:
        check_begun(directory, manifest)
        conversation = _continue(directory, manifest, checkpoint, tokenizer)
        ranks = ranks.or_as_last(manifest)
    placed = ranks.resolve(checkpoint.config)
    setup = Setup(
        model=str(checkpoint.path),
        **setup_types(dtype, attention, checkpoint, placed.device, held=(source, manifest)),
        **{"state": checkpoint.state, **session_fields(directory, manifest, checkpoint)},
    )
    if sys.stdin.isatty():
        shown = f"{placed.cp} cp x {placed.tp} tp on {placed.device}, {types_of(setup)}"
        draw.say(f"{checkpoint.name}: starting {shown} ...")
    if sampling.temperature:
        draw.say(f"sampling: {sampler.describe(sampling)}")
    with Resident(setup, placed) as resident:
        options = {"sampling": sampling, "count": count, "dtype": setup.kv_dtype, **wishes}
        answering = Answering(tokenizer=tokenizer, **options)
        terminal = Terminal(resident, checkpoint, conversation, answering)
        if directory is not None and manifest is not None:
            terminal.continue_session(directory, manifest.revision)
        for file in files:
            terminal.file(file)
        terminal.converse(asked)


def _check_options(
    source: str, manifest: Manifest | None, *, system: str | None, model: str | None
) -> None:
    """Raise UserError for options that do not go with a session, or with none."""
    from cptool.distributed.environment import launched_size

    if launched_size() is not None:
        raise UserError(
            "cptool chat starts its own ranks; run it without a launcher, with --cp and --tp"
        )
    if manifest is None:
        if model is not None:
            raise OptionError("model", model, f"{source} is not a session", "name the model alone")
        return
    if system is not None:
        raise UserError(
            f"--system: {source} is a conversation with a beginning of its own; leave it out"
        )


def _find_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Return the model's tokenizer; UserError if it has none."""
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise UserError(
            f"{checkpoint.path} has no tokenizer, so it cannot be talked with; "
            "use prefill with --token-ids"
        )
    return tokenizer


def _begin(tokenizer: Tokenizer, system: str | None) -> Conversation:
    """Return a new conversation; UserError if the model's template cannot render it."""
    from cptool.checkpoint.tokenizer.input_checks import check_text

    if system is not None:
        try:
            check_text(system)
        except UserError as error:
            raise UserError(f"--system: {error}") from None
    conversation = Conversation(tokenizer, system)
    # A template that is missing, or refuses the system message, raises here.
    conversation.ask("Hello")
    for role, name in (("system", "--system"), ("user", "questions")):
        if (role == "user" or system is not None) and tokenizer.leaves_out(role):
            draw.say(f"{name}: the model's chat template leaves the text out", always=True)
    return conversation


def _continue(
    directory: Path, manifest: Manifest, checkpoint: Checkpoint, tokenizer: Tokenizer
) -> Conversation:
    """Return the conversation of a session; UserError if it is of another model."""
    say_reading(checkpoint)
    sessions.check_model(manifest, sessions.identity(checkpoint))
    return Conversation.read(directory, manifest, tokenizer)
