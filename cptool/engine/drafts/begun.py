"""Tokens of a step that have passed the first layers of the model, before the others."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cptool.sharding import Placement


class Begun:
    """What this rank's tokens of a step have computed of the model's first `layers` layers.

    counts[b]: tokens of sequence b, on all ranks together.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.counts: dict[int, int] = {}
        self._rows: dict[tuple[int, int], torch.Tensor] = {}
        self._none: torch.Tensor | None = None

    def add(self, tokens: Mapping[int, int], hidden: torch.Tensor, mine: Placement) -> list[int]:
        """Add a token of each sequence in `tokens`. Return the sequences that this rank has rows
        of.

        hidden: the residual stream of those on this rank, [tokens, hidden], placed as in `mine`.
        """
        self._none = hidden[:0]
        rows, owned = iter(hidden), []
        for b, positions in enumerate(mine.sequences()):
            for position in positions.tolist():
                self._rows[b, position] = next(rows)
                owned.append(b)
        for b in tokens:
            self.counts[b] = self.counts.get(b, 0) + 1
        return owned

    def stacked(self, mine: Placement) -> torch.Tensor:
        """Return the residual stream of all tokens on this rank, placed as in `mine`, as a copy."""
        places = [
            (b, position)
            for b, positions in enumerate(mine.sequences())
            for position in positions.tolist()
        ]
        if not places:
            assert self._none is not None  # a token was added
            return self._none
        return torch.stack([self._rows[place] for place in places])
