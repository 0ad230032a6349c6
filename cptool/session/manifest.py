"""The manifest of a session: what the directory holds, and whether that can be.

`Manifest.parse` and `Manifest.check` are what every reader goes through. A manifest that passes
them names exactly the KV of the first `cached` tokens of each sequence, for every KV head.
"""

import hashlib
import json
import re
from collections import abc
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from operator import le
from typing import Any

from cptool.errors import UserError
from cptool.files import parse_json

FORMAT = 2
REMEDY = "restore it or prefill anew"
"""For a session, or a file of one, that is damaged."""
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element of KV, by its dtype."""

MANY_REVISIONS = 32
"""Turns whose segments are kept as they were written, before some are merged."""

SEGMENT_NAME = re.compile(r"segment-(\d{5,10})-(\d{3,5})-(\d{3,5})-[0-9a-f]{8}\.safetensors")
"""Revision, CP rank, first KV head, and a random part that keeps two runs apart."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST_POSITIONS = 2**31 - 1  # positions are int32, and the last one stands for an empty slot
_MOST_BYTES = 2**63 - 1
_MOST_RANKS = _MOST_HEADS = _MOST_LAYERS = _MOST_SEQUENCES = 1 << 16
_LONGEST_PATH = 4096
_LARGEST_HEADER = 100_000_000  # of a safetensors file, by the rules of that format


class Damaged(UserError):
    """A session's files are not what was written there."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
        """Whether any token of it can still count."""
        return any(n and a < z for n, a, z in zip(self.tokens, self.start, self.until, strict=True))

    @staticmethod
    def of(fields: dict) -> "Segment":
        """The segment of these fields, whose tuples may be lists, as JSON makes them."""
        return Segment(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


@dataclass(frozen=True)
class Sequence:
    """Everything said so far, how much of it has KV, the segment with the logits that come next, if
    they are known, and whether the last token ended an answer.
    """

    tokens: tuple[int, ...]
    cached: int
    logits: str | None = None
    ended: bool = False


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The state of a session.

    `session` names the session itself, so that another one in its place is not taken for it.
    `revision` counts what was ever committed. `turns[t][b]` is the number of tokens of sequence b
    after turn t + 1. `chat` holds the seals of the states of the conversation in chat.json, the
    latest last.
    """

    session: str
    model: ModelIdentity
    dtype: str
    cp: int
    tp: int
    revision: int
    turns: tuple[tuple[int, ...], ...]
    sequences: tuple[Sequence, ...]
    segments: tuple[Segment, ...] = ()
    chat: tuple[str, ...] = ()

    def dump(self) -> str:
        return sealed({"format": FORMAT, **asdict(self)})

    @staticmethod
    def parse(data: bytes) -> "Manifest":
        """Raises ValueError, in words for the user, if the bytes are not a manifest of this format
        as it was written, or say what cannot be.
        """
        found = parse_json(data)
        _require(isinstance(found, dict), "it is not an object")
        version = found.get("format")
        _require(
            type(version) is int and version == FORMAT,
            f"it has format {_quoted(version)}, this cptool reads format {FORMAT}",
        )
        seal = found.pop("sha256", None)
        _require(seal is not None, "it has no checksum (sha256), so it cannot be trusted")
        _require(seal == _checksum(_text(found)), "its checksum is that of something else")
        del found["format"]
        made = _made(Manifest, found, "the manifest")
        manifest = replace(
            made,
            model=_made(ModelIdentity, made.model, "model"),
            sequences=tuple(
                _made(Sequence, each, f"sequence {b}")
                for b, each in enumerate(_listed(made.sequences, "sequences"), 1)
            ),
            segments=tuple(
                _made(Segment, each, f"segment {i}")
                for i, each in enumerate(_listed(made.segments, "segments"), 1)
            ),
            turns=tuple(
                tuple(_listed(turn, f"turn {t}"))
                for t, turn in enumerate(_listed(made.turns, "turns"), 1)
            ),
            chat=tuple(_listed(made.chat, "chat")),
        )
        manifest = replace(
            manifest,
            sequences=tuple(
                replace(s, tokens=tuple(_listed(s.tokens, f"sequence {b}: tokens")))
                for b, s in enumerate(manifest.sequences, 1)
            ),
            segments=tuple(
                replace(
                    s,
                    **{
                        name: tuple(_listed(getattr(s, name), f"segment {i}: {name}"))
                        for name in ("kv_heads", "tokens", "start", "until")
                    },
                )
                for i, s in enumerate(manifest.segments, 1)
            ),
        )
        manifest.check()
        _require(
            manifest.revision < _MOST_POSITIONS,
            f"revision is {manifest.revision}, no other can follow it",
        )
        return manifest

    def check(self) -> None:
        """ValueError, in words for the user, unless every field is of its type and in its range,
        and the segments hold each cached position of every sequence and KV head exactly once, as
        far as can be known without their contents.
        """
        model, batch = self.model, len(self.sequences)
        _require(
            type(self.session) is str and re.fullmatch(r"[0-9a-f]{16}", self.session) is not None,
            f"session is {_quoted(self.session)}, it must be 16 hex digits",
        )
        _require(
            type(model.path) is str
            and 0 < len(model.path) <= _LONGEST_PATH
            and "\0" not in model.path,
            f"model: path is {_quoted(model.path)}, it must be the path of a checkpoint",
        )
        _digest(model.fingerprint, "model: fingerprint")
        _within(model.layers, 1, _MOST_LAYERS, "model: layers")
        _within(model.kv_heads, 1, _MOST_HEADS, "model: kv_heads")
        _within(model.head_dim, 1, _MOST_HEADS, "model: head_dim")
        _within(model.vocab_size, 1, _MOST_POSITIONS, "model: vocab_size")
        _require(
            type(self.dtype) is str and self.dtype in DTYPES,
            f"dtype is {_quoted(self.dtype)}, it must be one of {', '.join(DTYPES)}",
        )
        _within(self.cp, 1, _MOST_RANKS, "cp")
        _within(self.tp, 1, _MOST_RANKS, "tp")
        _within(self.revision, 1, _MOST_POSITIONS, "revision")
        _within(batch, 1, _MOST_SEQUENCES, "the number of sequences")
        _within(len(self.chat), 0, 2, "the number of chat states")
        for seal in self.chat:
            _digest(seal, "chat")
        for b, sequence in enumerate(self.sequences, 1):
            self._check_sequence(sequence, f"sequence {b}")
        self._check_turns()
        for i, segment in enumerate(self.segments, 1):
            self._check_segment(segment, f"segment {i}")
        names = {segment.file for segment in self.segments}
        _require(len(names) == len(self.segments), "two segments have one name")
        for b, sequence in enumerate(self.sequences, 1):
            _require(
                sequence.logits is None or sequence.logits in names,
                f"sequence {b}: logits {_quoted(sequence.logits)} are in none of its segments",
            )
        self._check_coverage()

    def _check_sequence(self, sequence: Sequence, where: str) -> None:
        top = self.model.vocab_size
        wrong = next((t for t in sequence.tokens if type(t) is not int or not 0 <= t < top), None)
        _require(
            wrong is None and None not in sequence.tokens,
            f"{where}: token {_quoted(wrong)} is not in the vocabulary of {top}",
        )
        length = len(sequence.tokens)
        _within(length, 0, _MOST_POSITIONS - 1, f"{where}: the number of tokens")
        _within(sequence.cached, 0, length, f"{where}: cached")
        _require(
            type(sequence.ended) is bool,
            f"{where}: ended is {_quoted(sequence.ended)}, it must be true or false",
        )
        _require(length or not sequence.ended, f"{where}: it ended without a token")
        _require(
            sequence.logits is not None or sequence.cached < length or not length,
            f"{where}: all of its {length} tokens have KV, but the logits that follow are missing",
        )
        if sequence.logits is not None:
            _require(type(sequence.logits) is str, f"{where}: logits is {_quoted(sequence.logits)}")
            _require(
                sequence.cached == length,
                f"{where}: logits follow its {length} tokens, but only {sequence.cached} have KV",
            )

    def _check_turns(self) -> None:
        _within(len(self.turns), 1, self.revision, "the number of turns")
        for t, turn in enumerate(self.turns, 1):
            self._check_counts(turn, f"turn {t}", _MOST_POSITIONS)
        said = tuple(len(sequence.tokens) for sequence in self.sequences)
        _require(
            self.turns[-1] == said,
            f"the last turn ends at {list(self.turns[-1])} tokens, the sequences have {list(said)}",
        )
        for t, (turn, following) in enumerate(pairwise(self.turns), 2):
            _require(
                all(map(le, turn, following)) and turn != following,
                f"turn {t} adds nothing to the one before",
            )

    def _check_segment(self, segment: Segment, where: str) -> None:
        model, heads = self.model, segment.kv_heads
        name = SEGMENT_NAME.fullmatch(segment.file) if type(segment.file) is str else None
        _require(
            name is not None and segment.file.isascii(),
            f"{where}: file is {_quoted(segment.file)}, it must be the name of a segment in the "
            "session's directory",
        )
        _within(segment.revision, 1, self.revision, f"{where}: revision")
        _within(segment.rank, 0, _MOST_RANKS - 1, f"{where}: rank")
        _require(len(heads) == 2, f"{where}: kv_heads is {_quoted(heads)}, it must be two numbers")
        _within(heads[0], 0, model.kv_heads - 1, f"{where}: kv_heads")
        _within(heads[1], heads[0] + 1, model.kv_heads, f"{where}: kv_heads")
        _require(
            tuple(map(int, name.groups())) == (segment.revision, segment.rank, heads[0]),
            f"{where}: {segment.file} is not the name of revision {segment.revision}, rank "
            f"{segment.rank}, KV head {heads[0]}",
        )
        _digest(segment.sha256, f"{where}: sha256")
        for field in ("tokens", "start", "until"):
            self._check_counts(getattr(segment, field), f"{where}: {field}", _MOST_POSITIONS)
        for b, (until, sequence) in enumerate(zip(segment.until, self.sequences, strict=True), 1):
            _within(until, 0, sequence.cached, f"{where}: until of sequence {b}")
        rows = sum(segment.tokens)
        least = rows * (4 + self.row_bytes(heads))
        logits = 4 * model.vocab_size * len(self.sequences)
        _within(segment.bytes, least, _MOST_BYTES, f"{where}: bytes")
        _within(segment.bytes, least, least + logits + _LARGEST_HEADER, f"{where}: bytes")

    def row_bytes(self, heads: tuple[int, int]) -> int:
        """Bytes of the KV of one token, for KV heads [heads[0], heads[1]) of all layers."""
        model = self.model
        return 2 * model.layers * (heads[1] - heads[0]) * model.head_dim * DTYPES[self.dtype]

    def _check_counts(self, counts: tuple, where: str, most: int) -> None:
        batch = len(self.sequences)
        _require(
            len(counts) == batch,
            f"{where} has {len(counts)} numbers for {batch} sequences",
        )
        for count in counts:
            _within(count, 0, most, where)

    def _check_coverage(self) -> None:
        """Each cached position of each KV head once, by ranges and by numbers of tokens."""
        groups: dict[tuple[int, int], list[Segment]] = {}
        for segment in self.segments:
            if segment.live:
                groups.setdefault((segment.revision, segment.rank), []).append(segment)
        revisions: dict[int, list[Segment]] = {}
        for (revision, rank), group in groups.items():
            group.sort(key=lambda s: s.kv_heads)
            where = f"revision {revision}, rank {rank}"
            bounds = [0, *(bound for s in group for bound in s.kv_heads), self.model.kv_heads]
            _require(
                all(a == b for a, b in zip(bounds[::2], bounds[1::2], strict=False)),
                f"{where}: its segments must hold each of {self.model.kv_heads} KV heads once",
            )
            _require(
                len({(s.tokens, s.start, s.until) for s in group}) == 1,
                f"{where}: its segments hold different tokens",
            )
            revisions.setdefault(revision, []).append(group[0])
        reached = [0] * len(self.sequences)
        for revision in sorted(revisions):
            pieces = revisions[revision]
            _require(
                len({(s.start, s.until) for s in pieces}) == 1,
                f"revision {revision}: its ranks hold different ranges",
            )
            for b, (start, until) in enumerate(zip(pieces[0].start, pieces[0].until, strict=True)):
                rows = sum(s.tokens[b] for s in pieces)
                if until <= start:
                    continue
                _require(
                    start == reached[b],
                    f"sequence {b + 1}: revision {revision} holds positions from {start}, those "
                    f"before end at {reached[b]}",
                )
                _require(
                    rows >= until - start,
                    f"sequence {b + 1}: revision {revision} has {rows} tokens for positions "
                    f"{start} to {until - 1}",
                )
                reached[b] = until
        for b, (end, sequence) in enumerate(zip(reached, self.sequences, strict=True), 1):
            _require(
                end == sequence.cached,
                f"sequence {b}: the segments hold {end} positions, they must hold "
                f"{sequence.cached}",
            )

    def truncated(self, lengths: list[int]) -> "Manifest":
        """The state in which sequence b has said its first `lengths[b]` tokens alone; nothing on
        disk changes.

        Where a sequence gets shorter, what follows its new end is not known any more: the KV of its
        last token is given up, so that the next turn computes it again. The result is a base to
        save on, or a state to commit where the lengths are those after a turn.
        """
        sequences = tuple(
            s
            if n == len(s.tokens)
            else Sequence(tokens=s.tokens[:n], cached=min(s.cached, max(n - 1, 0)))
            for s, n in zip(self.sequences, lengths, strict=True)
        )
        cached = [sequence.cached for sequence in sequences]
        segments = (replace(s, until=tuple(map(min, s.until, cached))) for s in self.segments)
        wanted = {sequence.logits for sequence in sequences}
        return replace(
            self,
            turns=tuple(turn for turn in self.turns if all(map(le, turn, lengths))),
            sequences=sequences,
            segments=tuple(s for s in segments if s.live or s.file in wanted),
        )

    def rewrite_from(self, start: abc.Sequence[int], until: abc.Sequence[int]) -> list[int]:
        """From which position of each sequence on the next turn, whose own KV is that of positions
        [start[b], until[b]), should write KV anew, so that segments stay few: `start` itself while
        they are.

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
        """The same turns, all of whose KV is still to be computed."""
        sequences = (replace(s, cached=0, logits=None) for s in self.sequences)
        return replace(self, sequences=tuple(sequences), segments=())


def sealed(fields: dict) -> str:
    """The text of a JSON object, with a checksum of all of `fields`."""
    text = _text(fields)
    return f'{{"sha256":"{_checksum(text)}",{text[1:]}'


def _text(fields: dict) -> str:
    return json.dumps(fields, separators=(",", ":"))


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _made(kind: type, found: Any, where: str) -> Any:
    """A dataclass of exactly its fields; their values are checked later."""
    _require(isinstance(found, dict), f"{where} is {_quoted(found)}, it must be an object")
    names = {field.name for field in fields(kind)}
    for name in sorted(found.keys() - names):
        raise ValueError(f"{where} has a field {_quoted(name)}, which is not known")
    for name in sorted(names - found.keys()):
        raise ValueError(f"{where} has no field {name!r}")
    return kind(**found)


def _listed(value: Any, where: str) -> list:
    _require(isinstance(value, list), f"{where} is {_quoted(value)}, it must be a list")
    return value


def _within(value: Any, least: int, most: int, where: str) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{where} is {_quoted(value)}, it must be {least} to {most}")


def _digest(value: Any, where: str) -> None:
    if type(value) is not str or not _DIGEST.fullmatch(value):
        raise ValueError(f"{where} is {_quoted(value)}, it must be 64 hex digits")


def _require(holds: Any, told: str) -> None:
    if not holds:
        raise ValueError(told)


def _quoted(value: Any) -> str:
    """The value in a few printable characters."""
    if isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value[:64] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
