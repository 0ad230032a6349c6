"""How a prompt is cut into chunks, and the room that its KV needs. Imports no torch.

A chunk has at most N new tokens over all sequences of a batch together, because it is their number
that decides what a forward takes. The sequences advance in step, each by the same number of tokens,
until the shorter ones end: then all KV that travels in a chunk is that of sequences which are still
being read, but for those that have ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cptool.errors import OptionError
from cptool.planning.strategy import SHORT

_DRIFT = 8
"""Tokens of a sequence by which a rank can be ahead of the others when all ranks share every chunk:
those that do not divide go to the ranks that hold fewest, one each, in the order of the ranks.
"""


def check_chunk(chunk: int | None) -> None:
    """Raise OptionError for a number of tokens that is no chunk; None leaves it to cptool."""
    if chunk is not None and (type(chunk) is not int or chunk < 1):
        rule = "it must be a whole number of tokens of at least 1, or auto"
        raise OptionError("chunk", chunk, rule, "leave it out for auto")


def cut(left: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield the new tokens of each sequence in each chunk, of sequences with `left[b]` to compute.

    most: tokens of a chunk, which all but the last have.
    """
    rest = list(left)
    while any(rest):
        lengths = _share(rest, most)
        yield lengths
        rest = [all_of - part for all_of, part in zip(rest, lengths, strict=True)]


def count(left: Sequence[int], most: int) -> int:
    """Return how many chunks `cut` yields."""
    return -(-sum(left) // max(1, most))


def _share(left: Sequence[int], most: int) -> list[int]:
    """Return how many of its `left[b]` tokens each sequence gets if `most` are dealt to all: as
    many as any other, or all of them. What does not divide goes to the first ones.
    """
    level, ended = 0, 0  # tokens that each sequence gets which is not shorter; tokens of those
    going = sorted(filter(None, left))
    while going and ended + going[0] * len(going) <= most:
        ended += going.pop(0)
    if going:
        level = (most - ended) // len(going)
        more = most - ended - level * len(going)
    lengths = []
    for tokens in left:
        if not going or tokens < going[0]:
            lengths.append(tokens)
        else:
            lengths.append(level + (more > 0))
            more -= 1
    return lengths


def room(left: Sequence[int], most: int, *, ranks: int, answer: int = 0) -> list[int]:
    """Return the slots for the KV of `left[b]` more tokens of each sequence, read in chunks of
    `most`, and of `answer` tokens after it, on any of `ranks` ranks.

    A chunk that is dealt to fewer than all ranks puts one ahead of the others by as much.
    """
    first = next(cut(left, most), [0] * len(left))
    ahead = [0] * len(left)
    if ranks > 1 and sum(first) < sum(left):
        ahead = [min(n, sum(first)) if sum(first) <= SHORT else _DRIFT for n in left]
    return [-(-(n + answer) // ranks) + 1 + more for n, more in zip(left, ahead, strict=True)]
