"""Which texts and token ids may enter a model."""

from collections.abc import Sequence

from cptool.errors import UserError


def check_text(text: str) -> None:
    """Refuse what is not text: bytes that were not UTF-8 arrive as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("it is not UTF-8 text; convert it first") from None


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse token ids that are not in the model's vocabulary."""
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"token id {low if low < 0 else high} is not in the model's vocabulary, 0 to "
            f"{vocab_size - 1}"
        )
