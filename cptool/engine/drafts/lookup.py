"""Drafts from what was said before: where the last tokens of a sequence occurred earlier, what came
next there may come next again.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from cptool.engine.drafts.pace import Budget, worthwhile
from cptool.engine.drafts.source import Source

_FEW = 512
"""Tokens up to which a table in Python is made faster than a sorted one."""

_CANDIDATES = 64
"""Earlier places that are compared, the latest ones."""

LONGEST = 32
"""Tokens of a match that are counted at most."""


@dataclass(frozen=True)
class Match:
    """The tokens that followed an earlier occurrence of a sequence's last `length` tokens."""

    length: int
    tokens: tuple[int, ...]


class Lookup:
    """An index of the pairs of tokens of one sequence, prompt and answer, that grows with it.

    The pairs of a prompt are sorted once; those of an answer go into a table. Of the places where
    the last two tokens stood before, `find` takes the one where most of the tokens before them are
    the same as well, the latest if several are equal.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._text = list(tokens)
        self._keys, self._ends = array("q"), array("q")
        self._table: dict[int, list[int]] = {}
        self._indexed = 1  # pairs that end before this place and have a successor are indexed
        if len(self._text) > _FEW:
            self._sort()

    def _sort(self) -> None:
        said = torch.tensor(self._text[:-1], dtype=torch.int64)
        keys, order = ((said[:-1] << 32) + said[1:]).sort(stable=True)
        self._keys, self._ends = array("q", keys.tolist()), array("q", (order + 1).tolist())
        self._indexed = len(self._text) - 1

    def push(self, token: int) -> None:
        """Append a token to the sequence."""
        self._text.append(token)

    @property
    def length(self) -> int:
        """Number of tokens of the sequence."""
        return len(self._text)

    def find(self, most: int) -> Match | None:
        """Return up to `most` tokens that may come next, None if the last two are new here."""
        text = self._text
        last = len(text) - 1
        for end in range(self._indexed, last):
            self._table.setdefault(_key(text, end), []).append(end)
        self._indexed = max(self._indexed, last)
        if last < 2 or most < 1:
            return None
        best = longest = 0
        for end in self._places(_key(text, last)):
            length = 2
            while length < min(LONGEST, end + 1) and text[end - length] == text[last - length]:
                length += 1
            if length > longest:
                best, longest = end, length
                if length == LONGEST:
                    break
        if not longest:
            return None
        tokens = text[best + 1 : best + 1 + most]
        period = last - best
        while len(tokens) < most:  # a loop goes on in itself
            tokens.append(tokens[len(tokens) - period])
        return Match(longest, tuple(tokens))

    def _places(self, key: int) -> Iterator[int]:
        """Yield the ends of earlier pairs, the latest first."""
        recent = self._table.get(key, [])
        yield from recent[: -_CANDIDATES - 1 : -1]
        first = bisect_left(self._keys, key)
        stop = bisect_left(self._keys, key + 1)
        for at in range(stop - 1, max(first, stop - _CANDIDATES) - 1, -1):
            yield self._ends[at]


_LENGTHS = 3, 4, 6, 10, LONGEST + 1
_PRIORS = 0.4, 0.6, 0.8, 0.9, 0.97
"""Part of the drafts that come true at first, by the length of their match: below 3, 4, ..."""


def kind_of(length: int) -> int:
    """Return the kind of the drafts of a match of `length` tokens."""
    return next(n for n, most in enumerate(_LENGTHS) if length < most)


class LookupDrafts(Source):
    """Drafts that are looked up in what each of the sequences in `active` has said.

    tokens[b]: those of sequence b before its answer.
    """

    def __init__(self, tokens: Sequence[Sequence[int]], active: Collection[int]) -> None:
        super().__init__(_PRIORS)
        self._lookups = {b: Lookup(tokens[b]) for b in active}

    def came(self, b: int, token: int) -> None:
        super().came(b, token)
        self._lookups[b].push(token)

    def find(
        self, picks: Mapping[int, int], most: Mapping[int, int], budget: Budget
    ) -> dict[int, list[int]]:
        # One more than may be drafted is compared with what comes.
        found = {b: self._lookups[b].find(most[b] + 1) for b in picks if most[b]}
        matches = {b: match for b, match in found.items() if match is not None}
        kinds = {b: kind_of(match.length) for b, match in matches.items()}
        counts = worthwhile(
            {b: self.acceptance.chance(kind) for b, kind in kinds.items()},
            {b: most[b] for b in matches},
            budget,
        )
        self.tried += sum(counts.values())
        self.expect({b: [(t, kinds[b]) for t in m.tokens] for b, m in matches.items()})
        return {b: list(matches[b].tokens[:n]) for b, n in counts.items() if n}


def _key(text: Sequence[int], end: int) -> int:
    return (text[end - 1] << 32) + text[end]
