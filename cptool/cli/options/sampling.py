"""The options that say how the next token is chosen."""

from __future__ import annotations

import click

from cptool.cli.options.records import as_object
from cptool.cli.options.types import TokenBias
from cptool.engine.sampling_request import SamplingRequest

__all__ = ["SamplingRequest", "sampling_options"]

_AUTHORS = "[default: the model author's, else "

sampling_options = as_object(
    "sampler",
    SamplingRequest,
    [
        click.option("--temperature", type=float, help=f"0 is greedy.  {_AUTHORS}0]"),
        click.option(
            "--top-p",
            type=float,
            help=f"Draw from the likeliest tokens of this mass.  {_AUTHORS}1]",
        ),
        click.option(
            "--top-k",
            type=int,
            metavar="K",
            help=f"Draw from the K likeliest tokens; 0 is all.  {_AUTHORS}0]",
        ),
        click.option(
            "--min-p",
            type=float,
            help="Draw from tokens at least this many times as likely as the likeliest.  "
            f"{_AUTHORS}0]",
        ),
        click.option(
            "--repetition-penalty",
            type=float,
            metavar="X",
            help=f"Above 1, make tokens of the prompt and the answer less likely.  {_AUTHORS}1]",
        ),
        click.option(
            "--presence-penalty",
            type=float,
            default=0.0,
            metavar="X",
            help="Lower the logits of tokens that the answer has, -2 to 2.  [default: 0]",
        ),
        click.option(
            "--frequency-penalty",
            type=float,
            default=0.0,
            metavar="X",
            help="Lower a token's logit for each time that the answer has it, -2 to 2.  "
            "[default: 0]",
        ),
        click.option(
            "--logit-bias",
            type=TokenBias(),
            multiple=True,
            metavar="ID=VALUE",
            help="Add VALUE to the logit of the token ID; repeatable.",
        ),
        click.option("--seed", type=int, default=0, help="Seed of the draws.  [default: 0]"),
    ],
)
