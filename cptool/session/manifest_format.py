"""Parsing and validation of manifests, which every reader and every commit goes through."""

import re
from dataclasses import fields, replace
from itertools import pairwise
from operator import le
from typing import Any

from cptool.files import parse_json
from cptool.quantisation import WEIGHTS, is_known
from cptool.session.manifest import (
    DTYPES,
    FORMAT,
    SEGMENT_NAME,
    Manifest,
    ModelIdentity,
    Segment,
    Sequence,
    checksum,
    text_of,
)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST_POSITIONS = 2**31 - 1  # positions are int32, and the last one stands for an empty slot
_MOST_BYTES = 2**63 - 1
_MOST_RANKS = _MOST_HEADS = _MOST_LAYERS = _MOST_SEQUENCES = 1 << 16
_LONGEST_PATH = 4096
_LARGEST_HEADER = 100_000_000  # of a safetensors file, by the rules of that format


def parse(data: bytes) -> Manifest:
    """Return the manifest encoded in `data`.

    Raises ValueError, with a message for users, if it is not a manifest of this format, was
    changed after it was written, or is inconsistent.
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
    _require(seal == checksum(text_of(found)), "its checksum is that of something else")
    del found["format"]
    # Older versions did not tell these apart, and quantised nothing.
    found = {"kv_dtype": found.get("dtype"), "weights": "file", **found}
    made = _made(Manifest, found, "the manifest")
    manifest = replace(
        made,
        model=_made(ModelIdentity, made.model, "model"),
        sequences=tuple(
            _made(Sequence, _with_ahead(each), f"sequence {b}")
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
            replace(
                s,
                tokens=tuple(_listed(s.tokens, f"sequence {b}: tokens")),
                ahead=tuple(_listed(s.ahead, f"sequence {b}: ahead")),
            )
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
    validate(manifest)
    _require(
        manifest.revision < _MOST_POSITIONS,
        f"revision is {manifest.revision}, no other can follow it",
    )
    return manifest


def validate(manifest: Manifest) -> None:
    """Raise ValueError, in words for the user, unless every field is of its type and in its range,
    and the segments hold each cached position of every sequence and KV head exactly once, as far as
    that can be known without their contents.
    """
    model, batch = manifest.model, len(manifest.sequences)
    _require(
        type(manifest.session) is str
        and re.fullmatch(r"[0-9a-f]{16}", manifest.session) is not None,
        f"session is {_quoted(manifest.session)}, it must be 16 hex digits",
    )
    _require(
        type(model.path) is str and 0 < len(model.path) <= _LONGEST_PATH and "\0" not in model.path,
        f"model: path is {_quoted(model.path)}, it must be the path of a checkpoint",
    )
    _digest(model.fingerprint, "model: fingerprint")
    _within(model.layers, 1, _MOST_LAYERS, "model: layers")
    _within(model.kv_heads, 1, _MOST_HEADS, "model: kv_heads")
    _within(model.head_dim, 1, _MOST_HEADS, "model: head_dim")
    _within(model.vocab_size, 1, _MOST_POSITIONS, "model: vocab_size")
    for name in ("dtype", "kv_dtype"):
        value = getattr(manifest, name)
        _require(
            type(value) is str and value in DTYPES,
            f"{name} is {_quoted(value)}, it must be one of {', '.join(DTYPES)}",
        )
    _require(
        is_known(manifest.weights),
        f"weights is {_quoted(manifest.weights)}, it must be one of {', '.join(WEIGHTS)}, or one "
        f"of these with kinds of matrices",
    )
    _within(manifest.cp, 1, _MOST_RANKS, "cp")
    _within(manifest.tp, 1, _MOST_RANKS, "tp")
    _within(manifest.revision, 1, _MOST_POSITIONS, "revision")
    _within(batch, 1, _MOST_SEQUENCES, "the number of sequences")
    _within(len(manifest.chat), 0, manifest.revision, "the number of chat states")
    for seal in manifest.chat:
        _digest(seal, "chat")
    for b, sequence in enumerate(manifest.sequences, 1):
        _check_sequence(manifest, sequence, f"sequence {b}")
    _check_turns(manifest)
    for i, segment in enumerate(manifest.segments, 1):
        _check_segment(manifest, segment, f"segment {i}")
    names = {segment.file for segment in manifest.segments}
    _require(len(names) == len(manifest.segments), "two segments have one name")
    for b, sequence in enumerate(manifest.sequences, 1):
        _require(
            sequence.logits is None or sequence.logits in names,
            f"sequence {b}: logits {_quoted(sequence.logits)} are in none of its segments",
        )
    _check_coverage(manifest)


def _check_sequence(manifest: Manifest, sequence: Sequence, where: str) -> None:
    top, every = manifest.model.vocab_size, (*sequence.tokens, *sequence.ahead)
    wrong = next((t for t in every if type(t) is not int or not 0 <= t < top), None)
    _require(
        wrong is None and None not in every,
        f"{where}: token {_quoted(wrong)} is not in the vocabulary of {top}",
    )
    length = len(sequence.tokens)
    _within(length, 0, _MOST_POSITIONS - 1, f"{where}: the number of tokens")
    _within(sequence.ahead_from, 0, length if sequence.ahead else 0, f"{where}: ahead_from")
    line = len(sequence.line)
    _within(line, 0, _MOST_POSITIONS - 1, f"{where}: the number of tokens read ahead")
    _within(sequence.cached, 0, line, f"{where}: cached")
    _require(
        type(sequence.ended) is bool,
        f"{where}: ended is {_quoted(sequence.ended)}, it must be true or false",
    )
    _require(length or not sequence.ended, f"{where}: it ended without a token")
    _require(
        sequence.logits is not None or sequence.cached < length or not length or sequence.ahead,
        f"{where}: all of its {length} tokens have KV, but the logits that follow are missing",
    )
    if sequence.logits is not None:
        _require(type(sequence.logits) is str, f"{where}: logits is {_quoted(sequence.logits)}")
        _require(
            sequence.held == length,
            f"{where}: logits follow its {length} tokens, but only {sequence.held} have KV",
        )


def _check_turns(manifest: Manifest) -> None:
    said = tuple(len(sequence.tokens) for sequence in manifest.sequences)
    # Before the first turn there is what was read of it.
    least = int(any(said) or not any(sequence.ahead for sequence in manifest.sequences))
    _within(len(manifest.turns), least, manifest.revision, "the number of turns")
    for t, turn in enumerate(manifest.turns, 1):
        _check_counts(manifest, turn, f"turn {t}", _MOST_POSITIONS)
    last = manifest.turns[-1] if manifest.turns else said
    _require(
        last == said,
        f"the last turn ends at {list(last)} tokens, the sequences have {list(said)}",
    )
    for t, (turn, following) in enumerate(pairwise(manifest.turns), 2):
        _require(
            all(map(le, turn, following)) and turn != following,
            f"turn {t} adds nothing to the one before",
        )


def _check_segment(manifest: Manifest, segment: Segment, where: str) -> None:
    model, heads = manifest.model, segment.kv_heads
    name = SEGMENT_NAME.fullmatch(segment.file) if type(segment.file) is str else None
    _require(
        name is not None and segment.file.isascii(),
        f"{where}: file is {_quoted(segment.file)}, it must be the name of a segment in the "
        "session's directory",
    )
    _within(segment.revision, 1, manifest.revision, f"{where}: revision")
    _within(segment.rank, 0, _MOST_RANKS - 1, f"{where}: rank")
    _require(len(heads) == 2, f"{where}: kv_heads is {_quoted(heads)}, it must be two numbers")
    _within(heads[0], 0, model.kv_heads - 1, f"{where}: kv_heads")
    _within(heads[1], heads[0] + 1, model.kv_heads, f"{where}: kv_heads")
    _require(
        name is not None
        and tuple(map(int, name.groups())) == (segment.revision, segment.rank, heads[0]),
        f"{where}: {segment.file} is not the name of revision {segment.revision}, rank "
        f"{segment.rank}, KV head {heads[0]}",
    )
    _digest(segment.sha256, f"{where}: sha256")
    for field in ("tokens", "start", "until"):
        _check_counts(manifest, getattr(segment, field), f"{where}: {field}", _MOST_POSITIONS)
    for b, (until, sequence) in enumerate(zip(segment.until, manifest.sequences, strict=True), 1):
        _within(until, 0, sequence.cached, f"{where}: until of sequence {b}")
    rows = sum(segment.tokens)
    least = rows * (4 + manifest.row_bytes(heads))
    logits = 4 * model.vocab_size * len(manifest.sequences)
    _within(segment.bytes, least, _MOST_BYTES, f"{where}: bytes")
    _within(segment.bytes, least, least + logits + _LARGEST_HEADER, f"{where}: bytes")


def _check_counts(manifest: Manifest, counts: tuple, where: str, most: int) -> None:
    batch = len(manifest.sequences)
    _require(
        len(counts) == batch,
        f"{where} has {len(counts)} numbers for {batch} sequences",
    )
    for count in counts:
        _within(count, 0, most, where)


def _check_coverage(manifest: Manifest) -> None:
    """Check that each cached position of each KV head is held once, by ranges and by numbers of
    tokens.
    """
    groups: dict[tuple[int, int], list[Segment]] = {}
    for segment in manifest.segments:
        if segment.live:
            groups.setdefault((segment.revision, segment.rank), []).append(segment)
    revisions: dict[int, list[Segment]] = {}
    for (revision, rank), group in groups.items():
        group.sort(key=lambda s: s.kv_heads)
        where = f"revision {revision}, rank {rank}"
        bounds = [0, *(bound for s in group for bound in s.kv_heads), manifest.model.kv_heads]
        _require(
            all(a == b for a, b in zip(bounds[::2], bounds[1::2], strict=False)),
            f"{where}: its segments must hold each of {manifest.model.kv_heads} KV heads once",
        )
        _require(
            len({(s.tokens, s.start, s.until) for s in group}) == 1,
            f"{where}: its segments hold different tokens",
        )
        revisions.setdefault(revision, []).append(group[0])
    reached = [0] * len(manifest.sequences)
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
    for b, (end, sequence) in enumerate(zip(reached, manifest.sequences, strict=True), 1):
        _require(
            end == sequence.cached,
            f"sequence {b}: the segments hold {end} positions, they must hold {sequence.cached}",
        )


def _with_ahead(found: Any) -> Any:
    """Return the fields of a sequence, those too that are left out if nothing was read ahead."""
    return {"ahead": [], "ahead_from": 0, **found} if isinstance(found, dict) else found


def _made(kind: type, found: Any, where: str) -> Any:
    """Return a dataclass of exactly its fields; their values are checked later."""
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


def _require(holds: Any, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _quoted(value: Any) -> str:
    """Return the value in a few printable characters."""
    if isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value[:64] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
