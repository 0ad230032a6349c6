"""`cptool chat`: a conversation at the terminal, its KV kept on the ranks between turns."""

import sys
from pathlib import Path

import click

from cptool.cli import draw
from cptool.cli.models import context_option, open_model, say_reading
from cptool.cli.options import (
    dtype_option,
    moved_option,
    ranks_by_default,
    resolve_dtype,
    resolve_ranks,
    run_options,
    sampling_options,
)
from cptool.cli.terminal import Terminal, lines
from cptool.errors import UserError
from cptool.session.conversation import Conversation

DEFAULT_TOKENS = 512


@click.command(short_help="Talk with a model, or go on in a saved session.")
@click.argument("source", metavar="MODEL|SESSION")
@click.option("--system", metavar="TEXT", help="A system message to begin with.")
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
@moved_option
@ranks_by_default("1, or the session's last", "1, or the session's last without --cp")
@run_options
@context_option
@dtype_option
def chat(
    source,
    system,
    count,
    temperature,
    top_p,
    seed,
    model,
    cp,
    tp,
    device,
    variant,
    partials,
    threads,
    timeout,
    context_length,
    dtype,
):
    """Talk with a MODEL in its own chat template, or go on in a SESSION that /save made.

    Only what a turn adds is computed. Where standard input is not a terminal, each line of it is a
    question. /help tells the commands.
    """
    from cptool.checkpoint.tokenizer.input_checks import check_text
    from cptool.distributed.environment import launched_size
    from cptool.engine.sampling import Sampling
    from cptool.session import store as sessions

    if launched_size() is not None:
        raise UserError(
            "cptool chat starts its own ranks; run it without a launcher, with --cp and --tp"
        )
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    directory, manifest = Path(source), None
    if sessions.exists(directory):
        manifest = sessions.load(directory)
        if system is not None:
            raise UserError(
                f"--system: {source} is a conversation with a beginning of its own; leave it out"
            )
        if dtype not in ("auto", manifest.dtype):
            raise UserError(
                f"--dtype {dtype}: the KV of {source} is {manifest.dtype}; leave --dtype out"
            )
        model = model or sessions.model_path(manifest)
    elif model is not None:
        raise UserError(f"--model {model}: {source} is no session; name the model alone")
    checkpoint = open_model(model or source, context_length)
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise UserError(
            f"{checkpoint.path} has no tokenizer, so it cannot be talked with; "
            "use prefill with --token-ids"
        )
    if system is not None:
        try:
            check_text(system)
        except UserError as error:
            raise UserError(f"--system: {error}") from None
    conversation = Conversation(tokenizer, system)
    # A template that refuses the system message, or is not there, does so now.
    conversation.ask("Hello")
    for role, name in (("system", "--system"), ("user", "questions")):
        if (role == "user" or system is not None) and tokenizer.leaves_out(role):
            draw.say(f"{name}: the model's chat template leaves the text out")
    if manifest is not None:
        say_reading(checkpoint)
        sessions.check_model(manifest, sessions.identity(checkpoint))
        conversation = Conversation.read(directory, manifest, tokenizer)
        if cp is None:
            cp, tp = manifest.cp, manifest.tp if tp is None else tp
    ranks = resolve_ranks(
        cp=cp, tp=tp, device=device, threads=threads, timeout=timeout, config=checkpoint.config
    )

    from cptool.engine.options import EngineOptions
    from cptool.engine.rank_server import Resident
    from cptool.engine.turn import Setup

    setup = Setup(
        model=str(checkpoint.path),
        dtype=manifest.dtype if manifest else resolve_dtype(dtype, checkpoint, ranks.device),
        options=EngineOptions(variant=variant, partials=partials),
        session=str(directory) if manifest else None,
        resume=manifest.revision if manifest else None,
        fingerprint=checkpoint.fingerprint if manifest else None,
        state=checkpoint.state,
    )
    if sys.stdin.isatty():
        draw.say(
            f"{checkpoint.name}: starting {ranks.cp} cp x {ranks.tp} tp on {ranks.device}, "
            f"{setup.dtype} ..."
        )
    with Resident(setup, ranks) as resident:
        terminal = Terminal(resident, checkpoint, conversation, sampling, count, setup.dtype)
        if manifest is not None:
            terminal.saved = (directory, manifest.revision)
            draw.say(
                f"{directory}: {len(conversation.exchanges)} answers, "
                f"{len(conversation.tokens):,} tokens so far"
            )
        for line in lines():
            if not terminal.handle(line):
                break
