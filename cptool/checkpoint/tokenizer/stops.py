"""Stop texts: an answer ends once its text contains one of them, and is shown up to it."""

from collections.abc import Sequence

from cptool.checkpoint.tokenizer.stream import TextStream


class StopStream:
    """The text of tokens as they come, up to the first of some stop texts.

    What may be the beginning of a stop text is held back, and nothing else. The time per token does
    not depend on how many came before.

    found: whether a stop text was completed; all text after that is left out.
    """

    def __init__(self, stream: TextStream, texts: Sequence[str]) -> None:
        self._stream = stream
        self._progress = [_Progress(text) for text in texts]
        self._held = ""
        self.found = False

    def push(self, token_id: int) -> str:
        """Return the text that is certain with this token."""
        return self._through(self._stream.push(token_id))

    def flush(self, *, ended: bool) -> str:
        """Return the text that was held back, with U+FFFD for a character that lacks bytes if the
        text has `ended`; otherwise that character belongs to the tokens to come.
        """
        held, self._held = self._held, ""
        if ended and not self.found:
            held += self._stream.flush()
        return held

    def _through(self, piece: str) -> str:
        if self.found:
            return ""
        text = self._held + piece
        starts = [
            len(self._held) + end - len(progress.text)
            for progress in self._progress
            if (end := progress.read(piece)) is not None
        ]
        self.found = bool(starts)
        certain = len(text) - max((progress.matched for progress in self._progress), default=0)
        if starts:
            certain = min(starts)
        self._held = "" if starts else text[certain:]
        return text[:certain]


def before_stop(text: str, texts: Sequence[str]) -> str:
    """Return what comes before the first of the stop texts that `text` contains."""
    return text[: min((text.find(stop) for stop in texts if stop in text), default=len(text))]


class _Progress:
    """How much of the beginning of `text` the characters read so far end in (Knuth, Morris, Pratt).

    matched: that many characters.
    """

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        # For each beginning of the text, the length of the longest shorter one that it ends in.
        self._shorter = [0, 0]
        for character in text[1:]:
            self._shorter.append(self._longer(self._shorter[-1], character))

    def read(self, piece: str) -> int | None:
        """Return the number of characters of `piece` after which the text is complete, None if it
        is not.
        """
        for number, character in enumerate(piece, 1):
            self.matched = self._longer(self.matched, character)
            if self.matched == len(self.text):
                return number
        return None

    def _longer(self, matched: int, character: str) -> int:
        """Return how much is matched after one more character; `matched` is not the whole text."""
        while matched and self.text[matched] != character:
            matched = self._shorter[matched]
        return matched + (self.text[matched] == character)
