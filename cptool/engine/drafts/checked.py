"""Tokens that a step computed beyond those that are known, and what would follow each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Checked:
    """The drafts of the last step, of which each sequence takes the first ones that come true.

    logits: float32 [vocabulary], what follows the draft of sequence b at `position`, by (b,
        position), on the rank that owns it.
    """

    def __init__(self) -> None:
        self.logits: dict[tuple[int, int], torch.Tensor] = {}
        self._tokens: dict[int, list[int]] = {}

    @property
    def left(self) -> bool:
        """Whether there is a draft that was not taken."""
        return any(self._tokens.values())

    def begin(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """Start over with `drafts[b]`, which follow the last token of each sequence."""
        self.logits = {}
        self._tokens = {b: list(reversed(tokens)) for b, tokens in drafts.items()}

    def take(self, b: int, token: int) -> bool:
        """Return whether `token` is the first draft of sequence b that is left; then it no longer
        is.
        """
        tokens = self._tokens.get(b)
        if not tokens or tokens[-1] != token:
            return False
        tokens.pop()
        return True
