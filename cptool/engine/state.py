"""The state of a batch of sequences on this rank: tokens, KV, and what every other rank holds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cptool.cache import KVCache, truncated
from cptool.engine.holdings import Holdings
from cptool.sharding import Placement


class OnDisk:
    """How much of an engine's state its session holds.

    rows[b]: tokens of sequence b in this rank's cache, the first ones, that segments hold.
    positions[b]: positions of sequence b that segments of all ranks hold.
    """

    def __init__(self, batch: int) -> None:
        self.rows, self.positions = [0] * batch, [0] * batch

    def update(self, rows: Sequence[int], positions: Sequence[int]) -> None:
        """Record that everything held is on disk."""
        self.rows, self.positions = list(rows), list(positions)

    def truncate(self, rows: Sequence[int], positions: Sequence[int]) -> None:
        """Record that the cache holds no more than this."""
        self.rows = list(map(min, self.rows, rows))
        self.positions = list(map(min, self.positions, positions))


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A state that `Engine.rewind` returns to: tokens and computed tokens of each sequence, and
    what each CP rank held of the latter.
    """

    lengths: tuple[int, ...]
    computed: tuple[int, ...]
    held: tuple[Placement, ...]


class BatchState:
    """A batch of sequences and their KV on this rank.

    tokens[b]: every token of sequence b so far, prompts and answers.
    computed[b]: how many of them have KV; the last token of an answer may be pending.
    logits[b]: float32 [vocabulary], what follows sequence b, on the rank that owns its last token.
    ended[b]: whether an answer ended with the sequence's last token.
    cache: the KV that this rank holds.
    holdings: which tokens every CP rank holds.
    on_disk: how much of this rank's KV the session holds (`cptool.engine.saving`).
    samples: answers per prompt, which follow one another in the batch (`cptool.engine.samples`).
    """

    samples = 1

    def __init__(self, cache: KVCache, *, ranks: int) -> None:
        batch = cache.batch
        self.cache = cache
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.computed = [0] * batch
        self.ended = [False] * batch
        self.logits: dict[int, torch.Tensor] = {}
        self.holdings = Holdings(ranks, batch)
        self.on_disk = OnDisk(batch)

    @property
    def held_tokens(self) -> int:
        """Number of tokens whose KV is in memory, on all CP ranks together."""
        return sum(map(sum, self.holdings.counts))

    def append(self, new: list[list[int]]) -> None:
        """Append `new[b]` to each sequence without computing anything; their KV stays pending."""
        for b, (tokens, added) in enumerate(zip(self.tokens, new, strict=True)):
            tokens.extend(added)
            if added:
                self.ended[b] = False
                self.logits.pop(b, None)

    def conclude(self, last: Mapping[int, int], *, ended: Collection[int]) -> None:
        """Append the last token of its answer to each sequence b, `last[b]`, whose KV stays
        pending; the answers of the sequences in `ended` do not go on.
        """
        for b, token in last.items():
            self.tokens[b].append(token)
            self.ended[b] = b in ended
            self.logits.pop(b, None)

    def truncate(self, lengths: list[int]) -> None:
        """Go back to the first `lengths[b]` tokens of each sequence, without computing anything.

        Where a sequence gets shorter, what follows its new end is unknown: the KV of its last token
        is dropped, so that the next `extend` computes it again, as in `Manifest.truncated`.
        """
        for b, length in enumerate(lengths):
            if length < len(self.tokens[b]):
                del self.tokens[b][length:]
                self.computed[b] = min(self.computed[b], max(length - 1, 0))
                self.ended[b] = False
                self.logits.pop(b, None)
        self.cache.truncate(self.computed)
        self.holdings.truncate(self.computed)
        self.on_disk.truncate(self.cache.lengths, self.computed)

    def mark(self) -> Mark:
        """Return this state as one that `rewind` returns to, any number of times.

        Logits are not part of it: where no token is pending, the last one will be.
        """
        pairs = zip(self.computed, self.tokens, strict=True)
        computed = tuple(min(done, max(len(said) - 1, 0)) for done, said in pairs)
        return Mark(
            lengths=tuple(map(len, self.tokens)),
            computed=computed,
            held=tuple(truncated(held, computed) for held in self.holdings.placements()),
        )

    def rewind(self, mark: Mark) -> None:
        """Go back to `mark`, since which tokens were only added; takes microseconds."""
        for said, length in zip(self.tokens, mark.lengths, strict=True):
            del said[length:]
        self.computed = list(mark.computed)
        self.ended = [False] * len(self.tokens)
        self.logits = {}
        self.cache.truncate(mark.computed)
        self.holdings.replace(mark.held)
        self.on_disk.truncate(self.cache.lengths, self.computed)

    @contextmanager
    def undone_by(self, error: type[BaseException]) -> Iterator[None]:
        """Go back to this very state, logits included, if the body raises `error`; it only adds."""
        mark = Mark(
            lengths=tuple(map(len, self.tokens)),
            computed=tuple(self.computed),
            held=tuple(self.holdings.placements()),
        )
        ended, logits = list(self.ended), dict(self.logits)
        try:
            yield
        except error:
            self.rewind(mark)
            self.ended, self.logits = ended, logits
            raise

    def adopt(
        self,
        tokens: Sequence[Sequence[int]],
        held: Sequence[Placement],
        *,
        ended: Sequence[bool] | None = None,
        logits: dict[int, torch.Tensor] | None = None,
    ) -> None:
        """Take over a state whose KV the caller has put into each rank's cache.

        tokens: of each sequence; those without KV are pending. held[r]: what rank r's cache holds.
        ended, logits: as the attributes; none by default.
        """
        self.tokens = [list(said) for said in tokens]
        counts = [placement.cu_seqlens.diff().tolist() for placement in held]
        self.computed = [sum(row) for row in zip(*counts, strict=True)]
        self.ended = [False] * len(self.tokens) if ended is None else list(ended)
        self.logits = logits or {}
        self.holdings.replace(held)
        self.on_disk = OnDisk(len(self.tokens))
