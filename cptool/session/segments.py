"""Segments of a session: what one rank adds in one turn, written once and never changed.

A segment is a safetensors file: `kv.I` [tokens, 2, kv_heads, head_dim] for every layer I, sequences
one after another; `positions` int32 [tokens]; and `logits.B` float32 [vocabulary] of what follows
sequence B, where this rank knew it. Nothing is ever unpickled.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import secrets
import struct
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from cptool import files
from cptool.errors import RunError
from cptool.files import sha256
from cptool.session.manifest import REMEDY, Damaged, Manifest, Segment
from cptool.session.store import check_size

if TYPE_CHECKING:
    import torch

    from cptool.cache import KVCache
    from cptool.sharding import Placement

STORED_AS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int32": "I32"}
"""Types of tensors by their names in safetensors files."""


@dataclass(frozen=True, kw_only=True)
class Addition:
    """What CP rank `rank` adds to a session to make `revision`, for KV heads [kv_heads[0],
    kv_heads[1]).

    since[b]: tokens of sequence b that the rank's cache holds and other segments have already; what
        follows them is written, at positions in [start[b], until[b]).
    """

    revision: int
    rank: int
    kv_heads: tuple[int, int]
    since: tuple[int, ...]
    start: tuple[int, ...]
    until: tuple[int, ...]


def write_segment(
    directory: Path,
    cache: "KVCache",
    addition: Addition,
    *,
    logits: "dict[int, torch.Tensor]",
    held: ExitStack,
) -> Segment | None:
    """Write an addition out of `cache`, and next-token logits by sequence, float32 [vocabulary].

    Return None, and write nothing, if there is nothing to write. The file is on disk when this
    returns, but no manifest names it yet: until `held` is closed, the file has the lock by which
    other processes know that it may still be committed.

    Raises RunError if the file cannot be written.
    """
    pairs = zip(cache.lengths, addition.since, strict=True)
    tokens = [length - first for length, first in pairs]
    if not any(tokens) and not logits:
        return None
    # The random part keeps two processes that start from the same turn from overwriting each
    # other's files.
    name = (
        f"segment-{addition.revision:05d}-{addition.rank:03d}-{addition.kv_heads[0]:03d}-"
        f"{secrets.token_hex(4)}.safetensors"
    )
    path, digest = directory / name, hashlib.sha256()
    try:
        file = held.enter_context(_held_file(path))
        for data in _contents(cache, addition.since, logits):
            digest.update(data)
            files.write_all(file, data)
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise RunError(
            f"{path} cannot be written ({error.strerror or error}); the session is as it was"
        ) from None
    return Segment(
        file=name,
        bytes=size,
        sha256=digest.hexdigest(),
        revision=addition.revision,
        rank=addition.rank,
        kv_heads=addition.kv_heads,
        tokens=tuple(tokens),
        start=addition.start,
        until=addition.until,
    )


def _contents(
    cache: "KVCache", since: tuple[int, ...], logits: "dict[int, torch.Tensor]"
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a segment with what `cache` holds beyond `since` tokens per sequence."""
    import torch

    from cptool.host.pinned_copies import to_host

    rows = zip(cache.held.sequences(), since, strict=True)
    small = {f"logits.{b}": row.cpu().contiguous() for b, row in sorted(logits.items())}
    small["positions"] = torch.cat([p[first:] for p, first in rows]).cpu()
    kv = (small["positions"].numel(), *cache.shape)
    yield _header(
        [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in small.items()]
        + [(f"kv.{layer}", cache.dtype, kv) for layer in range(cache.layers)]
    )
    for tensor in small.values():
        yield _bytes_of(tensor)
    pieces = to_host(
        cache.tokens_from(layer, b, first)
        for layer in range(cache.layers)
        for b, first in enumerate(since)
    )
    for piece in pieces:
        yield _bytes_of(piece.contiguous())


def _held_file(path: Path) -> BinaryIO:
    """A new file with the lock of a living run on it."""
    while True:
        file = files.create(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            return file
        # Before it was locked, another run may have taken it for one that was left.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _header(tensors: "list[tuple[str, torch.dtype, tuple[int, ...]]]") -> bytes:
    """The beginning of a safetensors file with these tensors, one after the other.

    The format's own writer is not used: it writes to a file under a name of its own.
    """
    fields, end = {}, 0
    for name, dtype, shape in tensors:
        first, end = end, end + math.prod(shape) * dtype.itemsize
        fields[name] = {
            "dtype": STORED_AS[str(dtype).removeprefix("torch.")],
            "shape": shape,
            "data_offsets": [first, end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes_of(tensor: "torch.Tensor") -> memoryview:
    """The bytes of a contiguous tensor in host memory; nothing is copied."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def restore(
    directory: Path,
    manifest: Manifest,
    cache: "KVCache",
    *,
    rank: int,
    ranks: int,
    kv_heads: tuple[int, int],
    reserve: int = 0,
) -> "tuple[Placement, ...]":
    """Fills an empty cache with this rank's share of the session and returns what every rank holds.

    KV heads [kv_heads[0], kv_heads[1]) are read, and room is kept for `reserve` more tokens of each
    sequence. The caller has called `verify` on the segments. Damaged, before the cache is
    touched, if their contents are not what the manifest says.
    """
    import torch

    from cptool.host.pinned_copies import to_device
    from cptool.sharding import Placement

    batch = len(manifest.sequences)
    with opened(directory, manifest) as stored:
        pieces = [_Piece.of(group, stored) for group in _groups(manifest)]
        for fault in _faults(manifest, pieces):
            raise Damaged(f"{directory}: {fault}; {REMEDY}")
        # shares[r][b]: (piece, first, last) in the order of the segments, rows of the piece's
        # tensors.
        shares = [[_share(pieces, b, r, ranks) for b in range(batch)] for r in range(ranks)]

        placements, order = [], []
        for r in range(ranks):
            rows = [
                torch.cat(
                    [piece.positions[a:z] for piece, a, z in share]
                    or [torch.empty(0, dtype=torch.int32)]
                )
                for share in shares[r]
            ]
            sorts = [row.argsort() for row in rows]
            placements.append(
                Placement.of([row[sort] for row, sort in zip(rows, sorts, strict=True)])
            )
            if r == rank:
                order = sorts

        lengths = [len(o) for o in order]
        cache.reserve([length + reserve for length in lengths])
        cache.extend(placements[rank].to(cache.device))

        def read(layer: int) -> torch.Tensor:
            parts = []
            for b in range(batch):
                rows = [
                    _read(stored, piece, layer, a, z, kv_heads) for piece, a, z in shares[rank][b]
                ]
                if rows:
                    parts.append(torch.cat(rows)[order[b]])
            return torch.cat(parts)

        if any(lengths):
            layers = to_device(map(read, range(cache.layers)), cache.device)
            for layer, kv in enumerate(layers):
                cache.store(layer, kv[:, 0], kv[:, 1])
    return tuple(placements)


def read_logits(directory: Path, manifest: Manifest) -> "dict[int, torch.Tensor]":
    """The next-token logits, float32 [vocabulary], of the sequences whose KV is complete. Damaged
    where no token can be chosen by them: a turn that ends so is not saved.
    """
    wanted = {s.logits for s in manifest.sequences} - {None}
    found = {}
    with opened(directory, manifest, wanted) as stored:
        for b, sequence in enumerate(manifest.sequences):
            if sequence.logits is None:
                continue
            found[b] = stored[sequence.logits].get_tensor(f"logits.{b}")
            if not found[b].max().isfinite():
                raise Damaged(
                    f"{directory / sequence.logits}: logits.{b} has no finite largest value; "
                    f"{REMEDY}"
                )
    return found


@contextmanager
def opened(
    directory: Path, manifest: Manifest, names: Container[str] | None = None
) -> Iterator[dict]:
    """The segments' files by name, or those in `names`, each with the tensors that the manifest
    makes it have. Damaged otherwise.
    """
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        found = {}
        for segment in manifest.segments:
            if names is not None and segment.file not in names:
                continue
            try:
                file = stack.enter_context(safe_open(directory / segment.file, framework="pt"))
                _check_tensors(manifest, segment, file)
            except FileNotFoundError:
                raise Damaged(f"{directory / segment.file} is missing; {REMEDY}") from None
            except (SafetensorError, ValueError) as error:
                raise Damaged(f"{directory / segment.file}: {error}; {REMEDY}") from None
            found[segment.file] = file
        yield found


def _check_tensors(manifest: Manifest, segment: Segment, file) -> None:
    """ValueError unless the file has the tensors of a segment, in their dtypes and shapes."""
    model, rows = manifest.model, sum(segment.tokens)
    heads = segment.kv_heads[1] - segment.kv_heads[0]
    stored = STORED_AS[manifest.dtype]
    expected = {"positions": ("I32", [rows])}
    for layer in range(model.layers):
        expected[f"kv.{layer}"] = (stored, [rows, 2, heads, model.head_dim])
    for b, sequence in enumerate(manifest.sequences):
        if sequence.logits == segment.file:
            expected[f"logits.{b}"] = ("F32", [model.vocab_size])
    names = set(file.keys())
    # Logits that no longer count stay in a file that is never changed.
    possible = {f"logits.{b}" for b in range(len(manifest.sequences))}
    if unknown := names - expected.keys() - possible:
        raise ValueError(f"it has a tensor {min(unknown)!r:.40}, which is none of a segment's")
    for name, (dtype, shape) in expected.items():
        if name not in names:
            raise ValueError(f"it has no tensor {name}")
        tensor = file.get_slice(name)
        if (tensor.get_dtype(), list(tensor.get_shape())) != (dtype, shape):
            raise ValueError(
                f"{name} is {tensor.get_dtype()} {list(tensor.get_shape())}, the manifest makes it "
                f"{dtype} {shape}"
            )


def position_faults(directory: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the positions that the segments hold, a line each without a remedy.

    Damaged where a file does not have the tensors that it must have.
    """
    with opened(directory, manifest) as stored:
        return list(_faults(manifest, [_Piece.of(group, stored) for group in _groups(manifest)]))


def _faults(manifest: Manifest, pieces: "list[_Piece]") -> Iterator[str]:
    """What keeps the pieces from holding each cached position of every sequence exactly once."""
    import torch

    held: list[list[torch.Tensor]] = [[] for _ in manifest.sequences]
    for piece in pieces:
        where = piece.segments[0].file
        for segment in piece.segments[1:]:
            if not torch.equal(piece.all_positions[segment.file], piece.positions):
                yield f"{segment.file} and {where} hold different positions"
                return
        rows = piece.positions.split(list(piece.segments[0].tokens))
        for b, (row, start, live) in enumerate(
            zip(rows, piece.segments[0].start, piece.live, strict=True), 1
        ):
            if (row.diff() <= 0).any():
                yield f"{where}: the positions of sequence {b} do not ascend"
                return
            if live and int(row[0]) < start:
                yield f"{where}: position {int(row[0])} of sequence {b} lies before {start}"
                return
            held[b - 1].append(row[:live])
    for b, (rows, sequence) in enumerate(zip(held, manifest.sequences, strict=True), 1):
        found = torch.cat([*rows, torch.empty(0, dtype=torch.int32)]).sort().values
        if not torch.equal(found, torch.arange(sequence.cached, dtype=torch.int32)):
            yield (
                f"sequence {b}: the segments hold {len(found)} positions, they must be 0 to "
                f"{sequence.cached - 1}, each once"
            )


@dataclass(frozen=True)
class _Piece:
    """Segments that hold different KV heads of the same tokens, in the order of their heads.

    `all_positions` are those of its rows, by file; rows [before[b], before[b] + live[b]) are the
    tokens of sequence b that count.
    """

    segments: tuple[Segment, ...]
    all_positions: "dict[str, torch.Tensor]"
    before: tuple[int, ...]
    live: tuple[int, ...]

    @staticmethod
    def of(segments: tuple[Segment, ...], stored: dict) -> "_Piece":
        first = segments[0]
        positions = {s.file: stored[s.file].get_tensor("positions") for s in segments}
        rows = positions[first.file].split(list(first.tokens))
        # Positions ascend, so those below the limit come first. Of a range that is empty, none
        # count, even of a sequence that was given up and said anew.
        live = tuple(
            int((row < until).sum()) if start < until else 0
            for row, start, until in zip(rows, first.start, first.until, strict=True)
        )
        return _Piece(segments, positions, tuple(accumulate(first.tokens, initial=0))[:-1], live)

    @property
    def positions(self) -> "torch.Tensor":
        return self.all_positions[self.segments[0].file]


def _groups(manifest: Manifest) -> list[tuple[Segment, ...]]:
    """Segments by the revision and rank that wrote them: each group has the same tokens and other
    KV heads.
    """
    groups: dict[tuple[int, int], list[Segment]] = {}
    for segment in manifest.segments:
        if segment.live:
            groups.setdefault((segment.revision, segment.rank), []).append(segment)
    return [tuple(sorted(groups[key], key=lambda s: s.kv_heads)) for key in sorted(groups)]


def _share(pieces: list[_Piece], b: int, rank: int, ranks: int) -> list[tuple[_Piece, int, int]]:
    """Which rows of which pieces rank `rank` takes of sequence b: an equal, contiguous part of all
    its tokens.

    Tokens that do not divide go one each to the ranks that follow those which took the previous
    sequence's, so that ranks differ by at most one token over the whole batch.
    """
    totals = [sum(piece.live[sequence] for piece in pieces) for sequence in range(b + 1)]
    share, extras = divmod(totals[b], ranks)
    relative = (rank - sum(totals[:b])) % ranks
    first = relative * share + min(relative, extras)
    last = first + share + (relative < extras)
    found, seen = [], 0
    for piece in pieces:
        count, before = piece.live[b], piece.before[b]
        a, z = max(first - seen, 0), min(last - seen, count)
        if a < z:
            found.append((piece, before + a, before + z))
        seen += count
    return found


def _read(
    stored: dict, piece: _Piece, layer: int, first: int, last: int, kv_heads: tuple[int, int]
) -> "torch.Tensor":
    """Rows [first, last) of a piece's layer for KV heads [kv_heads[0], kv_heads[1])."""
    import torch

    heads = []
    for segment in piece.segments:
        low, high = segment.kv_heads
        a, z = max(low, kv_heads[0]), min(high, kv_heads[1])
        if a < z:
            heads.append(
                stored[segment.file].get_slice(f"kv.{layer}")[first:last, :, a - low : z - low]
            )
    return heads[0] if len(heads) == 1 else torch.cat(heads, dim=2)


def verify(directory: Path, segments: Iterable[Segment]) -> None:
    """Raise Damaged if a segment's contents are not what was written. Reads every byte."""
    for segment in segments:
        check_size(directory, segment)
        file = directory / segment.file
        try:
            found = sha256(file)
        except FileNotFoundError:
            raise Damaged(f"{file} is missing; {REMEDY}") from None
        if found != segment.sha256:
            raise Damaged(f"{file} does not match its checksum; {REMEDY}")
