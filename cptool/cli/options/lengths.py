"""How many tokens an answer may have: -n, and the context's room for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from cptool.cli import draw
from cptool.cli.options.records import Decorator
from cptool.model.context import answer_limit

if TYPE_CHECKING:
    from cptool.model.config import LlamaConfig


def tokens_option(default: int, *, least: int = 1) -> Decorator:
    """Return the option -n, the argument `count`, None if it is not given."""
    return click.option(
        "-n",
        "--tokens",
        "count",
        type=click.IntRange(min=least),
        metavar="N",
        help="Answer with up to this many tokens, fewer if the context is full before.  "
        f"[default: {default}]",
    )


def tokens_to_append(
    count: int | None,
    default: int,
    config: LlamaConfig,
    *,
    new: Sequence[Sequence[int]],
    held: Sequence[int] | None = None,
) -> int:
    """Return how many tokens an answer may have: `count`, or less if the context has no room.

    new: the tokens of each prompt. held: how many tokens are before each.

    Says so if `count` was given and is too much. Raises UserError if the context has no room for a
    single token, unless `count` is 0.
    """
    from cptool.distributed.environment import is_first_rank

    lengths = list(map(len, new))
    before = [0] * len(new) if held is None else list(held)
    wanted = default if count is None else count
    limit = answer_limit(wanted, config, new=lengths, held=before)
    if count is not None and count > limit and is_first_rank():
        context = config.max_position_embeddings
        draw.say(
            f"-n {count}: the context of {context:,} tokens has room for {limit:,} more",
            always=True,
        )
    return limit
