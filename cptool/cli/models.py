"""Opening the model that a command names, and what the user is told about it."""

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from cptool import units
from cptool.cli import draw
from cptool.cli.types import TokenCount
from cptool.errors import UserError

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint

# Positions are 32-bit integers.
_MOST_POSITIONS = 2**31 - 1

_LARGE = 1 << 30
"""Bytes whose reading the user is told of."""

context_option = click.option(
    "--context-length",
    type=TokenCount(),
    metavar="N",
    help="Allow N positions, whatever the model's files say.  [default: the model's context]",
)


def open_model(model: str, context_length: int | None = None) -> "Checkpoint":
    """Open a checkpoint, with `context_length` in place of its own context if that is given.

    Shows the checkpoint's notes on standard error, once for all ranks of a launcher, unless its
    tokenizer is refused: the refusal, if it follows, is then the only line.
    """
    from cptool.checkpoint import open_checkpoint
    from cptool.distributed.environment import launched

    if context_length is not None and context_length > _MOST_POSITIONS:
        raise UserError(
            f"--context-length {context_length}: positions go up to {_MOST_POSITIONS}; give less"
        )
    checkpoint = open_checkpoint(model)
    if context_length is not None:
        config = replace(checkpoint.config, max_position_embeddings=context_length)
        checkpoint = replace(checkpoint, config=config)
    seat = launched()
    if checkpoint.notes and (seat is None or seat.rank == 0) and _has_sound_tokenizer(checkpoint):
        for note in checkpoint.notes:
            draw.say(note)
    return checkpoint


def _has_sound_tokenizer(checkpoint: "Checkpoint") -> bool:
    try:
        checkpoint.tokenizer()
    except UserError:
        return False
    return True


def say_reading(checkpoint: "Checkpoint") -> None:
    """Says that the fingerprint is about to be taken, where that takes a while."""
    from cptool.checkpoint.fingerprint import bytes_to_read
    from cptool.distributed.environment import launched

    seat = launched()
    if seat is not None and seat.rank:
        return
    size = bytes_to_read(checkpoint, checkpoint.state)
    if size >= _LARGE:
        draw.say(f"reading all {units.size(size)} of {checkpoint.name} once, to know it again")
