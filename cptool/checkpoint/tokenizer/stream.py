"""Text of tokens as they arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class TextStream:
    """Text of tokens as they come; the pieces together are what `decode` gives for all ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # The ids since the last piece, after those of that piece: a decoder may treat the first
        # token apart (it drops a leading space), so new text is what a known beginning grows by.
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token; often empty inside a character."""
        self._ids.append(token_id)
        return self._advance(hold_incomplete=True)

    def flush(self) -> str:
        """What was held back, replacement characters where it is no text."""
        return self._advance(hold_incomplete=False)

    def _advance(self, hold_incomplete: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown])
        now = self._tokenizer.decode(self._ids)
        if len(now) <= len(before) or (hold_incomplete and now.endswith(_REPLACEMENT)):
            return ""
        del self._ids[: self._shown]
        self._shown = len(self._ids)
        return now[len(before) :]
