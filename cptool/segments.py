"""Segments of a session: what one rank adds in one turn, written once and never changed.

A segment is a safetensors file: `kv.I` [tokens, 2, kv_heads, head_dim] for every layer I, sequences
one after another; `positions` int32 [tokens]; and `logits.B` float32 [vocabulary] of what follows
sequence B, where this rank knew it. Nothing is ever unpickled.
"""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from cptool.paths import sha256
from cptool.session import REMEDY, Damaged, Manifest, Segment, check_size, sync

if TYPE_CHECKING:
    import torch

    from cptool.cache import KVCache
    from cptool.sharding import Placement


def write_segment(
    directory: Path,
    cache: "KVCache",
    since: list[int],
    *,
    revision: int,
    rank: int,
    kv_heads: tuple[int, int],
    start: list[int],
    until: list[int],
    logits: "dict[int, torch.Tensor]",
) -> Segment | None:
    """Writes what `cache` holds beyond `since` tokens of each sequence, and next-token logits by
    sequence.

    The positions written lie in [start[b], until[b]) of sequence b.

    Returns None, and writes nothing, where there is nothing to write. The file is on disk when this
    returns, but no manifest names it yet.
    """
    import safetensors.torch
    import torch
    from safetensors import SafetensorError

    from cptool.pinned import to_host

    lengths = cache.lengths
    tokens = [length - first for length, first in zip(lengths, since)]
    if not any(tokens) and not logits:
        return None
    tensors = {f"logits.{b}": row.contiguous() for b, row in logits.items()}
    held = cache.held.sequences()
    tensors["positions"] = torch.cat([p[first:] for p, first in zip(held, since)])
    # Off the device first: a batch is put together in host memory, where there is more of it.
    pieces = to_host(
        cache.tokens_from(layer, b, first)
        for layer in range(cache.layers)
        for b, first in enumerate(since)
    )
    for layer in range(cache.layers):
        parts = [next(pieces) for _ in since]
        tensors[f"kv.{layer}"] = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    # The random part keeps two runs that start from the same turn from writing over each other's
    # files.
    name = f"segment-{revision:05d}-{rank:03d}-{kv_heads[0]:03d}-{secrets.token_hex(4)}.safetensors"
    temporary = directory / f"{name}.tmp"
    try:
        safetensors.torch.save_file(
            {key: tensor.cpu() for key, tensor in tensors.items()}, temporary
        )
        sync(temporary)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{temporary} cannot be written ({error}); the session is as it was"
        ) from None
    temporary.rename(directory / name)
    return Segment(
        file=name,
        bytes=(directory / name).stat().st_size,
        sha256=sha256(directory / name),
        revision=revision,
        rank=rank,
        kv_heads=kv_heads,
        tokens=tuple(tokens),
        start=tuple(start),
        until=tuple(until),
    )


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
    sequence. The caller has verified the segments with `check`.
    """
    import torch
    from safetensors import safe_open

    from cptool.pinned import to_device
    from cptool.sharding import Placement

    batch = len(manifest.sequences)
    files = {s.file: safe_open(directory / s.file, framework="pt") for s in manifest.segments}
    pieces = [_Piece.of(group, files) for group in _groups(manifest)]
    # shares[r][b]: (piece, first, last) in the order of the segments, rows of the piece's tensors.
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
        placements.append(Placement.of([row[sort] for row, sort in zip(rows, sorts)]))
        if r == rank:
            order = sorts

    lengths = [len(o) for o in order]
    cache.reserve([length + reserve for length in lengths])
    cache.extend(placements[rank].to(cache.device))

    def read(layer: int) -> torch.Tensor:
        parts = []
        for b in range(batch):
            rows = [_read(files, piece, layer, a, z, kv_heads) for piece, a, z in shares[rank][b]]
            if rows:
                parts.append(torch.cat(rows)[order[b]])
        return torch.cat(parts)

    if any(lengths):
        layers = to_device(map(read, range(cache.layers)), cache.device)
        for layer, kv in enumerate(layers):
            cache.store(layer, kv[:, 0], kv[:, 1])
    return tuple(placements)


def read_logits(directory: Path, manifest: Manifest) -> "dict[int, torch.Tensor]":
    """The next-token logits, float32 [vocabulary], of the sequences whose KV is complete."""
    from safetensors import safe_open

    found = {}
    for b, sequence in enumerate(manifest.sequences):
        if sequence.logits is not None:
            with safe_open(directory / sequence.logits, framework="pt") as file:
                found[b] = file.get_tensor(f"logits.{b}")
    return found


@dataclass(frozen=True)
class _Piece:
    """Segments that hold different KV heads of the same tokens, in the order of their heads.

    `positions` of its rows; rows [before[b], before[b] + live[b]) are the tokens of sequence b that
    count.
    """

    segments: tuple[Segment, ...]
    positions: "torch.Tensor"
    before: tuple[int, ...]
    live: tuple[int, ...]

    @staticmethod
    def of(segments: tuple[Segment, ...], files) -> "_Piece":
        first = segments[0]
        positions = files[first.file].get_tensor("positions")
        rows = positions.split(list(first.tokens))
        # Positions ascend, so those below the limit come first.
        live = tuple(int((row < limit).sum()) for row, limit in zip(rows, first.until))
        return _Piece(segments, positions, tuple(accumulate(first.tokens, initial=0))[:-1], live)


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
    files, piece: _Piece, layer: int, first: int, last: int, kv_heads: tuple[int, int]
) -> "torch.Tensor":
    """Rows [first, last) of a piece's layer for KV heads [kv_heads[0], kv_heads[1])."""
    import torch

    heads = []
    for segment in piece.segments:
        low, high = segment.kv_heads
        a, z = max(low, kv_heads[0]), min(high, kv_heads[1])
        if a < z:
            heads.append(
                files[segment.file].get_slice(f"kv.{layer}")[first:last, :, a - low : z - low]
            )
    return heads[0] if len(heads) == 1 else torch.cat(heads, dim=2)


def check(directory: Path, segments: Iterable[Segment]) -> None:
    """Damaged if a segment's contents are not what was written. Every byte is read."""
    for segment in segments:
        check_size(directory, segment)
        file = directory / segment.file
        if sha256(file) != segment.sha256:
            raise Damaged(f"{file} does not match its checksum; {REMEDY}")
