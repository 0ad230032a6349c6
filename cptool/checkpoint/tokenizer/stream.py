"""Text of tokens as they arrive."""

from collections.abc import Callable

_REPLACEMENT = "\ufffd"


class TextStream:
    """Decodes tokens one at a time; the pieces together are what `decode` gives for all ids."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        # The ids since the last piece, after those of that piece: a decoder may treat the first
        # token apart (it drops a leading space), so new text is what a known beginning grows by.
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token_id: int) -> str:
        """Return the text that is certain with this token, often none inside a character."""
        self._ids.append(token_id)
        return self._advance(hold_incomplete=True)

    def flush(self) -> str:
        """Return the text that was held back, with replacement characters for incomplete ones."""
        return self._advance(hold_incomplete=False)

    def _advance(self, hold_incomplete: bool) -> str:
        before = self._decode(self._ids[: self._shown])
        now = self._decode(self._ids)
        if len(now) <= len(before) or (hold_incomplete and now.endswith(_REPLACEMENT)):
            return ""
        del self._ids[: self._shown]
        self._shown = len(self._ids)
        return now[len(before) :]
