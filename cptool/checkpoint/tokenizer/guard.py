"""Control tokens in messages, kept apart from those that a chat template writes.

A template writes control tokens such as `<|im_start|>` as text, and so may a user, who must not be
able to begin a turn of his own. What looks like a control token in a message is marked before
rendering, and what is unmarked afterwards is the template's.
"""

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any


class Guard:
    """Keeps control tokens in messages apart from those that a template writes.

    The marks are private and random, so that no message can hold one.
    """

    def __init__(self, control_tokens: Iterable[str]) -> None:
        # Digits alone: whatever filter a template applies to a message, no letter case is at stake.
        nonce = secrets.randbits(64)
        self._mark = f"\ufdd0{nonce}\ufdd1"
        longest_first = sorted(control_tokens, key=len, reverse=True)
        alternatives = _any_of(longest_first)
        self._unmarked = re.compile(f"(?<!{self._mark})(?:{alternatives})")
        self._all = frozenset(longest_first)
        self.placeholders = {
            token: f"\ufdd2{nonce}-{index}\ufdd3" for index, token in enumerate(longest_first)
        }
        self.placeholder = re.compile(f"\ufdd2{nonce}-\\d+\ufdd3")

    def mark(self, value: Any, tokens: frozenset[str] | None = None) -> Any:
        """Return a message, or a part of one, with a mark before each control token in its strings.

        With `tokens`, only these are marked.
        """
        start = _starts(self._all if tokens is None else tokens)
        if isinstance(value, str):
            return start.sub(self._mark, value)
        if isinstance(value, Mapping):
            return {key: self.mark(item, tokens) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item, tokens) for item in value]
        return value

    def unmark(self, rendered: str) -> str:
        """Return the rendered text without marks, the template's control tokens as placeholders."""
        text = self._unmarked.sub(lambda match: self.placeholders[match.group()], rendered)
        return text.replace(self._mark, "")


def _any_of(longest_first: Sequence[str]) -> str:
    return "|".join(map(re.escape, longest_first)) or r"(?!)"


@cache
def _starts(tokens: frozenset[str]) -> re.Pattern[str]:
    # A lookahead finds overlapping occurrences too, each of which must be broken.
    return re.compile(f"(?=(?:{_any_of(sorted(tokens, key=len, reverse=True))}))")
