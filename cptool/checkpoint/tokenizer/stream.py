"""Text of tokens as they arrive."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"

_KNOWN = 8
"""Tokens before a stream that are enough to go on from, if the first is whole characters."""


class TextStream:
    """Decodes tokens as they come; the pieces together are what `decode` gives for all ids.

    after: ids that come before, whose text was written already, but for a character that they
        leave unfinished: it is part of the first piece.
    """

    def __init__(self, decode: Callable[[list[int]], str], after: Sequence[int] = ()) -> None:
        self._decode = decode
        # The ids since the last piece, after those of that piece: a decoder may treat the first
        # token apart (it drops a leading space), so new text is what a known beginning grows by.
        self._ids: list[int] = []
        self._known = 0  # number of ids up to the last piece that ended in a whole character
        self._shown = 0  # characters of their text that were returned
        start = max(0, self._last_whole(after) - _KNOWN)
        self.push(*after[max(0, self._last_whole(after[:start]) - 1) :])

    def push(self, *token_ids: int) -> str:
        """Return the text that is certain with these tokens, often none inside a character."""
        # A decoder may replace every byte of several characters if the last lacks one.
        singly = self._last_whole(token_ids)
        pieces = [self._take(token_ids[:singly]), *(self._take([i]) for i in token_ids[singly:])]
        return "".join(pieces)

    def _last_whole(self, ids: Sequence[int]) -> int:
        """Return the number of ids up to the last that is whole characters by itself."""
        count = len(ids)
        while count and _REPLACEMENT in self._decode([ids[count - 1]]):
            count -= 1
        return count

    def _take(self, token_ids: Sequence[int]) -> str:
        if not token_ids:
            return ""
        self._ids += token_ids
        text = self._decode(self._ids)
        certain = text.rstrip(_REPLACEMENT)
        piece = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        if piece and certain == text:
            del self._ids[: self._known]
            self._known, self._shown = len(self._ids), len(self._decode(self._ids))
        return piece

    def flush(self) -> str:
        """Return the text that was held back, with replacement characters for incomplete ones."""
        text = self._decode(self._ids)
        piece = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return piece
