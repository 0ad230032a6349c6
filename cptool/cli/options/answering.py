"""The options that say where answers end, and what is reported of their tokens."""

from __future__ import annotations

import click

from cptool.cli.options.records import as_object
from cptool.engine.answers.request import MOST_LOGPROBS, AnswerRequest

__all__ = ["AnswerRequest", "answering_options", "stop_options"]

_stop = click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="End an answer before this text; may be repeated.  The tokens that complete the text are "
    "kept in a session.",
)

_draft = click.option(
    "--draft",
    metavar="[off|lookup|layers:E|MODEL|auto]",
    default="off",
    help="Compute several tokens in a step, of which those that come next are kept. The answers "
    "are the same. lookup: what came next where the last tokens occurred before, in the prompt or "
    "the answer. layers:E: what the first E layers of the model expect. MODEL: what a small "
    "model with the same vocabulary expects. auto: lookup, where the batch and the ranks allow "
    "it.  [default: off]",
)

stop_options = as_object("wanted", AnswerRequest, [_stop, _draft])

answering_options = as_object(
    "wanted",
    AnswerRequest,
    [
        _stop,
        _draft,
        click.option(
            "--logprobs",
            type=int,
            metavar="K",
            help="Report the log-probability of each token of the answer, and of the K likeliest "
            f"in its place (0 to {MOST_LOGPROBS}): log-softmax of the model's own logits, before "
            "penalties, temperature and truncation.",
        ),
        click.option(
            "--prompt-logprobs",
            type=int,
            metavar="K",
            help="Report the same of each token of the prompt, given those before it.",
        ),
    ],
)
