"""The manifest of a session: what the directory holds.

Readers get it from `cptool.session.manifest_format.parse`. One that passes its checks names exactly
the KV of the first `cached` tokens of each sequence, for every KV head.
"""

import hashlib
import json
import re
from collections import abc
from dataclasses import asdict, dataclass, replace
from operator import le
from typing import Any

from cptool.errors import UserError

FORMAT = 2
REMEDY = "restore it or prefill anew"
"""For a session, or a file of one, that is damaged."""
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element of KV, by its dtype."""

MANY_REVISIONS = 32
"""Turns whose segments are kept as they were written, before some are merged."""

SEGMENT_NAME = re.compile(r"segment-(\d{5,10})-(\d{3,5})-(\d{3,5})-[0-9a-f]{8}\.safetensors")
"""Revision, CP rank, first KV head, and a random part that keeps two runs apart."""


class Damaged(UserError):
    """A session's files do not hold what was written."""


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Which model's KV a session holds: where it was, a fingerprint of its contents, the shape of
    its KV, and how many token ids it knows.
    """

    path: str
    fingerprint: str
    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One file: what CP rank `rank` added to make `revision`, for KV heads [kv_heads[0],
    kv_heads[1]).

    `tokens[b]` tokens of sequence b, of which those at positions in [start[b], until[b]) count.
    """

    file: str
    bytes: int
    sha256: str
    revision: int
    rank: int
    kv_heads: tuple[int, int]
    tokens: tuple[int, ...]
    start: tuple[int, ...]
    until: tuple[int, ...]

    @property
    def live(self) -> bool:
        """Whether any token of the segment can still count."""
        return any(n and a < z for n, a, z in zip(self.tokens, self.start, self.until, strict=True))

    @staticmethod
    def of(fields: dict[str, Any]) -> "Segment":
        """Return the segment of these fields, whose tuples may be lists, as JSON makes them."""
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return Segment(**known)


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Everything said so far, how much of it has KV, the segment with the logits that come next, if
    they are known, and whether the last token ended an answer.

    ahead: tokens of a turn that was not read to its end, which follow the first `ahead_from` of
        `tokens`. `cached` then counts KV of these and of `ahead`; that of other tokens was given
        up (`cptool.session.unfinished`).
    """

    tokens: tuple[int, ...]
    cached: int
    logits: str | None = None
    ended: bool = False
    ahead: tuple[int, ...] = ()
    ahead_from: int = 0

    @property
    def line(self) -> tuple[int, ...]:
        """The tokens that `cached` counts along."""
        return self.tokens[: self.ahead_from] + self.ahead if self.ahead else self.tokens

    @property
    def held(self) -> int:
        """How many of `tokens` have KV."""
        return min(self.cached, self.ahead_from) if self.ahead else self.cached

    @property
    def read_ahead(self) -> int:
        """How many tokens of `ahead` have KV."""
        return max(0, self.cached - self.ahead_from) if self.ahead else 0

    def truncated(self, length: int) -> "Sequence":
        """Return the first `length` tokens, with what was read ahead if it follows them."""
        if length == len(self.tokens):
            return self
        if self.ahead and length >= self.ahead_from:
            return replace(self, tokens=self.tokens[:length], logits=None, ended=False)
        kept = min(self.held, max(length - 1, 0))
        return Sequence(tokens=self.tokens[:length], cached=kept)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The state of a session.

    `session` names the session itself, so that another one in its place is not taken for it.
    `revision` counts what was ever committed. `turns[t][b]` is the number of tokens of sequence b
    after turn t + 1. `chat` holds the seals of the states of the conversation in chat.json, one for
    each turn after which it is known, the latest last. `dtype` is what the last turn computed in,
    `kv_dtype` the type of all KV, `weights` what the model's weights were quantised to, or "file".
    """

    session: str
    model: ModelIdentity
    dtype: str
    kv_dtype: str
    weights: str
    cp: int
    tp: int
    revision: int
    turns: tuple[tuple[int, ...], ...]
    sequences: tuple[Sequence, ...]
    segments: tuple[Segment, ...] = ()
    chat: tuple[str, ...] = ()

    def dump(self) -> str:
        """Return the text of manifest.json."""
        fields = asdict(self)
        for sequence in fields["sequences"]:
            if not sequence["ahead"]:  # as versions wrote it that did not know of it
                del sequence["ahead"], sequence["ahead_from"]
        return sealed({"format": FORMAT, **fields})

    def row_bytes(self, heads: tuple[int, int]) -> int:
        """Return the bytes of the KV of one token, for KV heads [heads[0], heads[1]) of all
        layers.
        """
        model = self.model
        return 2 * model.layers * (heads[1] - heads[0]) * model.head_dim * DTYPES[self.kv_dtype]

    def truncated(self, lengths: list[int]) -> "Manifest":
        """Return the state in which sequence b has its first `lengths[b]` tokens alone; nothing on
        disk changes.

        Where a sequence gets shorter, what follows its new end is not known any more: the KV of its
        last token is given up, so that the next turn computes it again. The result is a base to
        save on, or a state to commit where the lengths are those after a turn.
        """
        pairs = zip(self.sequences, lengths, strict=True)
        return replace(
            self.with_sequences([sequence.truncated(n) for sequence, n in pairs]),
            turns=tuple(turn for turn in self.turns if all(map(le, turn, lengths))),
        )

    def with_sequences(self, sequences: abc.Sequence[Sequence]) -> "Manifest":
        """Return the same with other sequences, whose KV is a beginning of what these have."""
        cached = [sequence.cached for sequence in sequences]
        segments = (replace(s, until=tuple(map(min, s.until, cached))) for s in self.segments)
        wanted = {sequence.logits for sequence in sequences}
        return replace(
            self,
            sequences=tuple(sequences),
            segments=tuple(s for s in segments if s.live or s.file in wanted),
        )

    def rewrite_from(self, start: abc.Sequence[int], until: abc.Sequence[int]) -> list[int]:
        """Return the position of each sequence from which the next turn should write KV again, so
        that segments stay few. Its own KV is that of positions [start[b], until[b]); the result is
        `start` while segments are few.

        Beyond `MANY_REVISIONS`, what is newer than a revision is merged with it once it is as much:
        each token is written again a number of times that grows with the logarithm of the tokens,
        and so does the number of revisions that have segments.
        """
        spans = {
            s.revision: [(a, min(z, n)) for a, z, n in zip(s.start, s.until, start, strict=True)]
            for s in self.segments
        }
        sizes = {r: sum(max(0, z - a) for a, z in span) for r, span in spans.items()}
        live = [r for r in sorted(spans) if sizes[r]]
        first, size = list(start), sum(until) - sum(start)
        if len(live) < MANY_REVISIONS:
            return first
        while live and sizes[live[-1]] <= size:
            size += sizes[live[-1]]
            first = [
                min(f, a) if a < z else f
                for f, (a, z) in zip(first, spans[live.pop()], strict=True)
            ]
        return first

    def without_kv(self) -> "Manifest":
        """Return the same turns without KV, all of which is to be computed again."""
        sequences = (Sequence(tokens=s.tokens, cached=0, ended=s.ended) for s in self.sequences)
        return replace(self, sequences=tuple(sequences), segments=())


def sealed(fields: dict) -> str:
    """Return the text of a JSON object with a checksum of all of `fields`."""
    text = text_of(fields)
    return f'{{"sha256":"{checksum(text)}",{text[1:]}'


def text_of(fields: dict) -> str:
    """Return the JSON of `fields`, whose checksum seals them."""
    return json.dumps(fields, separators=(",", ":"))


def checksum(text: str) -> str:
    """Return the SHA-256 of a text in hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()
