"""Where drafts come from, as users name it. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cptool.errors import OptionError, UserError

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint

DRAFTS = ("off", "lookup", "auto")
"""Where tokens are drafted from: nowhere, or what the sequence has said so far. "auto" does that
too, and does not report where the batch or the ranks do not allow it. Beside these there are
"layers:E", the first E layers of the model, and the path of a small model.
"""

_LAYERS = "layers:"


def layers_of(draft: str) -> int | None:
    """Return the E of "layers:E", None for another source."""
    return int(draft.removeprefix(_LAYERS)) if draft.startswith(_LAYERS) else None


def model_of(draft: str) -> str | None:
    """Return the path of the model that drafts, None for another source."""
    return None if draft in DRAFTS or draft.startswith(_LAYERS) else draft


def checked(draft: str, checkpoint: Checkpoint) -> str:
    """Return `draft`, for a model its path.

    Raises OptionError or UserError unless drafts for the model of `checkpoint` can come from there.
    """
    if not isinstance(draft, str) or not draft:
        raise OptionError(
            "draft", repr(draft), f"it must be {', '.join(DRAFTS)}, layers:E or MODEL"
        )
    if draft.startswith(_LAYERS):
        _check_layers(draft, checkpoint.config.num_hidden_layers)
    if model_of(draft) is None:
        return draft
    from cptool.checkpoint import open_checkpoint

    try:
        small = open_checkpoint(draft)
    except UserError as error:
        raise UserError(f"`draft`: {error}, or one of {', '.join(DRAFTS)}, layers:E") from None
    _check_vocabulary(draft, small, checkpoint)
    return str(small.path)


def _check_layers(draft: str, layers: int) -> None:
    count = draft.removeprefix(_LAYERS)
    if not (count.isascii() and count.isdecimal()) or not 1 <= int(count) < layers:
        rule = f"E must be at least 1, and less than the {layers} layers of the model"
        raise OptionError("draft", draft, rule, f"such as layers:{max(1, layers // 3)}")


def _check_vocabulary(draft: str, small: Checkpoint, checkpoint: Checkpoint) -> None:
    """Raise OptionError unless a token's id means the same to both models."""
    count, ours = small.config.vocab_size, checkpoint.config.vocab_size
    remedy = "give a model of the same family"
    if count != ours:
        rule = f"it has {count:,} tokens, and {checkpoint.name} has {ours:,}"
        raise OptionError("draft", draft, rule, remedy)
    theirs, own = small.tokenizer(), checkpoint.tokenizer()
    if theirs is None and own is None:
        return
    if theirs is None or own is None:
        without = draft if theirs is None else checkpoint.name
        rule = f"{without} has no tokenizer, so their tokens cannot be compared"
        raise OptionError("draft", draft, rule, remedy)
    for token in range(count):
        if theirs.spelling(token) != own.spelling(token):
            rule = (
                f"its token {token} is {theirs.spelling(token)!r}, "
                f"that of {checkpoint.name} {own.spelling(token)!r}"
            )
            raise OptionError("draft", draft, rule, remedy)
