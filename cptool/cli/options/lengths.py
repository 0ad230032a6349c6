"""How many tokens an answer may have: -n, and the context's room for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from cptool.cli import draw
from cptool.cli.options.prompts import check_context
from cptool.cli.options.records import Decorator

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
    check_context(lengths, before, min(wanted, 1), config)
    context = config.max_position_embeddings
    room = context - max(n + h for n, h in zip(lengths, before, strict=True))
    if count is not None and count > room and is_first_rank():
        draw.say(
            f"-n {count}: the context of {context:,} tokens has room for {room:,} more", always=True
        )
    return min(wanted, room)
