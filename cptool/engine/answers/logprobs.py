"""Log-probabilities of tokens: of an answer's as they are chosen, and of a prompt's.

Those of a prompt are computed by each rank for the rows that it holds, some rows at a time: the
logits of a long prompt would not fit into memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from cptool.engine.answers.records import Logprobs, TokenLogprob
from cptool.sharding import Placement

if TYPE_CHECKING:
    from cptool.engine.engine import Engine

_LOGITS_AT_ONCE = 1 << 24
"""Elements of logits that exist at a time: 64 MiB, and as much again for their logarithms."""

_PHASE = "log-probabilities of the prompt, token"

_FLOAT, _INTEGER = struct.Struct("<f"), struct.Struct("<i")


def scored(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Return the log-probability of each of `tokens`, one after each row of `logits`.

    logits: float32 [rows, vocabulary].
    """
    rows = _scores(logits, tokens, top).tolist()
    return [_record(token, row, top) for token, row in zip(tokens, rows, strict=True)]


def _scores(logits: torch.Tensor, tokens: Sequence[int], top: int) -> torch.Tensor:
    """Return, float64 [rows, 1 + 2 top] on the CPU, the log-probability of each row's token, those
    of the likeliest tokens, and their ids.
    """
    table = logits.log_softmax(-1)
    targets = torch.tensor(tokens, dtype=torch.int64, device=table.device)
    values, ids = table.topk(top, dim=-1)
    parts = table.gather(-1, targets[:, None]), values, ids
    return torch.cat([part.double() for part in parts], dim=-1).cpu()


def _record(token: int, row: Sequence[float], top: int) -> TokenLogprob:
    likeliest = zip(map(int, row[1 + top :]), row[1 : 1 + top], strict=True)
    return TokenLogprob(token, row[0], tuple(likeliest))


def packed(score: TokenLogprob) -> list[int]:
    """Return a token's log-probability as integers, which ranks that know none add zeros to."""
    assert score.logprob is not None  # it follows something
    values = score.logprob, *(value for _, value in score.top)
    bits = [_INTEGER.unpack(_FLOAT.pack(value))[0] for value in values]
    return [*bits, *(token for token, _ in score.top)]


def unpacked(token: int, numbers: Sequence[int]) -> TokenLogprob:
    """Return what `packed` packed, of `token`."""
    top = len(numbers) // 2
    values = [_FLOAT.unpack(_INTEGER.pack(bits))[0] for bits in numbers[: 1 + top]]
    return _record(token, [*values, *numbers[1 + top :]], top)


def packed_size(top: int) -> int:
    """Return how many integers `packed` returns."""
    return 1 + 2 * top


class PromptScores:
    """The tokens `new` that `engine` is about to compute, in one forward or several, and what this
    rank knows of them.

    scored_from: the first of `new[b]` that has a score; the first token of a sequence never has.
    scores: of some tokens each, float64 [tokens, 2 + 1 + 2 top]: sequence, position, `_scores`.
    """

    def __init__(
        self,
        engine: Engine,
        new: Sequence[Sequence[int]],
        top: int,
        scored_from: Sequence[int] | None = None,
    ) -> None:
        self.engine, self.new, self.top = engine, new, top
        self.starts = list(map(len, engine.tokens))
        skipped = scored_from or [0] * len(new)
        self.firsts = [max(1, n + m) for n, m in zip(self.starts, skipped, strict=True)]
        self.scores: list[torch.Tensor] = []
        for b, row in engine.logits.items():  # what the first one follows was computed earlier
            if new[b] and engine.computed[b] == self.starts[b] == self.firsts[b]:
                self._score(b, row[None], [self.starts[b]])

    def score(self, hidden: torch.Tensor, placement: Placement, going: Callable[[], bool]) -> None:
        """Score the tokens that follow the rows of a forward's result, while it is `going`."""
        model, done = self.engine.model, 0
        at_once = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
        rows = hidden.split(placement.cu_seqlens.diff().tolist())
        for b, (part, positions) in enumerate(zip(rows, placement.sequences(), strict=True)):
            following = positions.to(torch.int64) + 1
            end = self.starts[b] + len(self.new[b])
            kept = (following >= self.firsts[b]) & (following < end)
            part, places = part[kept], following[kept].tolist()
            for first in range(0, len(places), at_once):
                if not going():
                    return
                self.engine.report(_PHASE, done, placement.tokens)
                piece = slice(first, first + at_once)
                done += len(places[piece])
                self._score(b, model.logits(part[piece]), places[piece])

    def _score(self, b: int, logits: torch.Tensor, positions: list[int]) -> None:
        tokens = [self.new[b][position - self.starts[b]] for position in positions]
        where = torch.tensor([[b, position] for position in positions], dtype=torch.float64)
        self.scores.append(torch.cat([where, _scores(logits, tokens, self.top)], dim=-1))

    def gathered(self) -> Logprobs | None:
        """Return the scores of all ranks on rank 0, None on the others. Collective."""
        world, top = self.engine.world, self.top
        mine = torch.cat([torch.empty(0, 3 + 2 * top, dtype=torch.float64), *self.scores])
        parts = world.gather(mine if world.tp_rank == 0 else None)
        if world.rank:
            return None
        rows: dict[tuple[int, int], list[float]] = {}
        for part in parts:
            if part is not None:
                rows |= {(int(b), int(p)): row for b, p, *row in part.tolist()}
        return tuple(
            tuple(
                _record(token, rows[b, p], top)
                if p >= self.firsts[b]
                else TokenLogprob(token, None, ())
                for p, token in enumerate(tokens, start)
            )
            for b, (start, tokens) in enumerate(zip(self.starts, self.new, strict=True))
        )
