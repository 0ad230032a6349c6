"""`cptool demo`: a real model reads a long document on two ranks and answers from it, as one rank
does.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from importlib import resources
from typing import TYPE_CHECKING

import click

from cptool.cli import draw, turn_report
from cptool.cli.answers.report import has_ended
from cptool.cli.answers.stream import AnswerStream
from cptool.cli.options.examples import examples
from cptool.cli.options.models import open_model
from cptool.cli.options.ranks import RankRequest, attention_options, ranks_by_default
from cptool.cli.pull.fetching import fetching
from cptool.distributed.options import RankOptions
from cptool.engine.options import EngineOptions
from cptool.engine.setup.types import resolve_types
from cptool.errors import UserError
from cptool.model.context import check_context
from cptool.units import duration, some

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.engine.turn import Report, Turn

MODEL = "smollm2-135m-instruct"
QUESTION = "What is the cat's name?"
ANSWER_TOKENS = 40


@click.command(
    short_help="A real model answers from a long document, on two ranks as on one.",
    epilog=examples(
        "cptool demo",
        'cptool demo --cp 4 --question "What happened in the storm?"',
    ),
)
@click.option(
    "--question", default=QUESTION, show_default=True, help="What to ask about the document."
)
@ranks_by_default("2")
@attention_options
def demo(question: str, ranks: RankRequest, attention: EngineOptions) -> None:
    """Read a long document on two ranks, answer a question about it, and compare with one rank.

    The document is a lighthouse keeper's logbook of several thousand tokens that comes with cptool;
    the model is smollm2-135m-instruct, pulled if it is not here yet. Exits with 1 if the answers
    differ.
    """
    from cptool.checkpoint import catalogue
    from cptool.distributed.environment import launched_size
    from cptool.engine.turn import Turn

    if launched_size() is not None:
        raise UserError("cptool demo starts its own ranks; run it without a launcher")
    with fetching(MODEL) as watch:
        path = catalogue.pull(MODEL, watch)
    checkpoint = open_model(str(path))
    document = read_document()
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None  # this model has one
    prompt = tokenizer.chat([{"role": "user", "content": f"{document}\n{question}"}])
    check_context([len(prompt)], [0], ANSWER_TOKENS, checkpoint.config)
    many = dataclasses.replace(ranks, cp=ranks.cp or 2).resolve(checkpoint.config)
    dtype, options = resolve_types("auto", attention, checkpoint, many.device)
    turn = Turn(
        model=str(path),
        prompts=(tuple(prompt),),
        dtype=dtype,
        options=options,
        max_new_tokens=ANSWER_TOKENS,
        stop_ids=checkpoint.answer_ends(prompt),
    )
    draw.say(
        f"{MODEL} reads {len(document.split()):,} words ({len(prompt):,} tokens) on "
        f"{many.count} ranks."
    )
    click.echo(f"Q: {question}")
    answers = [
        list(_run(turn, placed, tokenizer if placed is many else None).token_ids[0])
        for placed in (many, dataclasses.replace(many, cp=1, tp=1))
    ]
    sys.exit(_compare(answers, many))


def read_document() -> str:
    """Return the logbook."""
    return resources.files("cptool").joinpath("data", "lighthouse.txt").read_text("utf-8")


def _run(turn: Turn, ranks: RankOptions, tokenizer: Tokenizer | None) -> Report:
    """Run the turn and print what it did; with a tokenizer, the answer as it comes."""
    from cptool.cli.launch import check_whole, run_turn

    began = time.perf_counter()
    stream = AnswerStream(tokenizer, lead="A: ") if tokenizer is not None else None
    report = run_turn(turn, ranks, emit=stream.emit if stream else None)
    assert report is not None  # there is no launcher
    if stream is not None:
        stream.finish(ended=has_ended(report.stopped[0]))
    check_whole(report, turn)
    taken = duration(time.perf_counter() - began)
    total = f"{some(ranks.count, 'rank')}, {taken} with start and loading"
    rows = [*turn_report.prefill_rows(report), *turn_report.decode_rows(report)]
    draw.table([("", total), *rows, *turn_report.source_rows(report)])
    return report


def _compare(answers: list[list[int]], many: RankOptions) -> int:
    """Print whether both answers are the same, and return the exit code."""
    of_many, of_one = answers
    count = many.count
    if of_many != of_one:
        click.echo(
            f"check: the tokens of {count} ranks differ from those of 1 rank: {of_many} and "
            f"{of_one}"
        )
        return 1
    click.echo(
        f"check: tokens of {count} ranks = tokens of 1 rank ({len(of_many)} of {len(of_many)})"
    )
    return 0
