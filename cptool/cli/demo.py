"""`cptool demo`: a real model reads a long document on two ranks and answers from it, as one rank
does.
"""

import sys
import time
from dataclasses import replace
from importlib import resources

import click

from cptool.cli import draw
from cptool.cli.models import open_model
from cptool.cli.options import ranks_by_default, resolve_dtype, resolve_ranks, run_options
from cptool.cli.prompts import check_context
from cptool.errors import UserError
from cptool.units import duration

MODEL = "smollm2-135m-instruct"
QUESTION = "What is the cat's name?"
ANSWER_TOKENS = 40


@click.command(short_help="A real model answers from a long document, on two ranks as on one.")
@click.option(
    "--question", default=QUESTION, show_default=True, help="What to ask about the document."
)
@ranks_by_default("2")
@run_options
def demo(question, cp, tp, device, variant, partials, threads, timeout):
    """Read a long document on two ranks, answer a question about it, and compare with one rank.

    The document is a lighthouse keeper's logbook of several thousand tokens that comes with cptool;
    the model is smollm2-135m-instruct, pulled if it is not here yet. Exits with 1 if the answers
    differ.
    """
    from cptool.checkpoint import catalogue
    from cptool.distributed.environment import launched_size

    if launched_size() is not None:
        raise UserError("cptool demo starts its own ranks; run it without a launcher")
    path = catalogue.pull(MODEL, lambda step: draw.say(f"{MODEL}: {step}"))
    checkpoint = open_model(str(path))
    document = (
        resources.files("cptool").joinpath("data", "lighthouse.txt").read_text(encoding="utf-8")
    )
    tokenizer = checkpoint.tokenizer()
    prompt = tokenizer.chat([{"role": "user", "content": f"{document}\n{question}"}])
    check_context([len(prompt)], [0], ANSWER_TOKENS, checkpoint.config)
    many = resolve_ranks(
        cp=cp or 2, tp=tp, device=device, threads=threads, timeout=timeout, config=checkpoint.config
    )

    from cptool.cli.launch import run_turn
    from cptool.engine.options import EngineOptions
    from cptool.engine.turn import Turn

    turn = Turn(
        model=str(path),
        prompts=(tuple(prompt),),
        dtype=resolve_dtype("auto", checkpoint, many.device),
        options=EngineOptions(variant=variant, partials=partials),
        max_new_tokens=ANSWER_TOKENS,
        stop_ids=checkpoint.answer_ends(prompt),
    )
    reports = []
    for ranks in (many, replace(many, cp=1, tp=1)):
        stream = not reports
        if stream:
            draw.say(
                f"{MODEL} reads {len(document.split()):,} words ({len(prompt):,} tokens) on "
                f"{ranks.cp * ranks.tp} ranks."
            )
            click.echo(f"Q: {question}")
            click.echo("A: ", nl=False)
            sys.stdout.flush()
        began = time.perf_counter()
        report = run_turn(turn, ranks, stream=stream)
        reports.append(report)
        draw.table(
            [
                (
                    "",
                    f"{ranks.cp * ranks.tp} rank(s), {duration(time.perf_counter() - began)} "
                    "with start and loading",
                ),
                *draw.prefill_rows(report),
                *draw.decode_rows(report),
            ]
        )
    answers = [list(report.token_ids[0]) for report in reports]
    if answers[0] != answers[1]:
        click.echo(
            f"check: the tokens of {many.cp * many.tp} ranks differ from those of 1 rank: "
            f"{answers[0]} and {answers[1]}"
        )
        sys.exit(1)
    click.echo(
        f"check: tokens of {many.cp * many.tp} ranks = tokens of 1 rank ({len(answers[0])} of "
        f"{len(answers[0])})"
    )
