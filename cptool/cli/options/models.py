"""The model and the session that a command names."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cptool import units
from cptool.cli import draw
from cptool.cli.options.types import TokenCount
from cptool.cli.pull.fetching import fetching
from cptool.errors import UserError

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.engine.turn import Turn
    from cptool.model.config import LlamaConfig
    from cptool.session.manifest import Manifest

_LARGE = 1 << 30
"""Bytes whose reading takes long enough to be announced."""

context_option = click.option(
    "--context-length",
    type=TokenCount(),
    metavar="N",
    help="Allow N positions, whatever the model's files say.  [default: the model's context]",
)


def open_model(model: str, context_length: int | None = None) -> "Checkpoint":
    """Open a checkpoint, with `context_length` in place of its own context if that is given.

    Prints the checkpoint's notes on standard error, once for all ranks of a launcher, unless its
    tokenizer is refused: the refusal, if it follows, is then the only line.
    """
    from cptool.checkpoint import open_checkpoint
    from cptool.distributed.environment import is_first_rank

    with fetching(model) as watch:
        checkpoint = open_checkpoint(model, context_length, watch=watch)
    if checkpoint.notes and is_first_rank() and _has_sound_tokenizer(checkpoint):
        for note in checkpoint.notes:
            draw.say(note, always=True)
    return checkpoint


def open_shape(model: str, notes: list[str] | None = None) -> "LlamaConfig":
    """Return the shape of a model as `find_shape` does."""
    from cptool.checkpoint.shapes import find_shape

    with fetching(model) as watch:
        return find_shape(model, notes, watch)


def _has_sound_tokenizer(checkpoint: "Checkpoint") -> bool:
    try:
        checkpoint.tokenizer()
    except UserError:
        return False
    return True


def say_reading(checkpoint: "Checkpoint") -> None:
    """Announce that all of the checkpoint is read for its fingerprint, if that takes long."""
    from cptool.checkpoint.fingerprint import bytes_to_read
    from cptool.distributed.environment import is_first_rank

    if not is_first_rank():
        return
    size = bytes_to_read(checkpoint, checkpoint.state)
    if size >= _LARGE:
        draw.say(f"reading all {units.size(size)} of {checkpoint.name} once, to recognise it later")


def session_fields(
    directory: Path | None, manifest: "Manifest | None", checkpoint: "Checkpoint"
) -> dict[str, Any]:
    """Return the fields of a `Setup` that name the session and guard it; none without a
    directory.
    """
    if directory is None:
        return {}
    return {
        "session": str(directory),
        "resume": manifest.revision if manifest else None,
        "fingerprint": checkpoint.fingerprint,
        "state": checkpoint.state,
    }


def check_turn_room(turn: "Turn", config: "LlamaConfig") -> None:
    """Raise UserError for a disk without room for what the turn adds to its session."""
    batch = len(turn.prompts)
    tokens = sum(map(len, turn.prompts)) + batch * turn.max_new_tokens
    if turn.session is not None:
        check_room(Path(turn.session), config, tokens=tokens, batch=batch, dtype=turn.kv_dtype)


def check_room(
    directory: Path, config: "LlamaConfig", *, tokens: int, batch: int, dtype: str
) -> None:
    """Raise UserError for a disk without room for the KV of `tokens` more tokens of a batch, and
    the logits after them.
    """
    from cptool.planning.cost.counts import kv_bytes
    from cptool.planning.cost.forward import ELEMENT_BYTES

    needed = kv_bytes(config, tokens, ELEMENT_BYTES[dtype]) + 4 * config.vocab_size * batch
    place = next(p for p in (directory, *directory.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{directory} has {units.size(free)} free, the KV of {tokens:,} tokens needs "
            f"{units.size(needed)}; make room, or name another directory"
        )
