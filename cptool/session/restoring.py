"""Reading the KV of a session: which ranks take which rows of which segments."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from cptool.session.manifest import REMEDY, Damaged, Manifest, Segment
from cptool.session.segments import opened

if TYPE_CHECKING:
    import torch

    from cptool.cache import KVCache
    from cptool.sharding import Placement


def restore(
    directory: Path,
    manifest: Manifest,
    cache: "KVCache",
    *,
    rank: int,
    ranks: int,
    kv_heads: tuple[int, int],
    reserve: Sequence[int] | None = None,
) -> "tuple[Placement, ...]":
    """Fill an empty cache with this rank's part of the session and return what every rank holds.

    KV heads [kv_heads[0], kv_heads[1]) are read, and room is kept for `reserve[b]` more tokens of
    each sequence. The caller has called `verify` on the segments. Raises Damaged, before the cache
    is changed, if their contents do not match the manifest.
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
        share = _own if _as_written(pieces, batch, ranks) else _even
        shares = [[share(pieces, b, r, ranks) for b in range(batch)] for r in range(ranks)]

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
        more = reserve or [0] * batch
        cache.reserve([length + slots for length, slots in zip(lengths, more, strict=True)])
        cache.extend(placements[rank].to(cache.device))

        def read(layer: int) -> torch.Tensor:
            parts = []
            for b in range(batch):
                rows = [
                    _read(stored, piece, layer, rows=(a, z), kv_heads=kv_heads)
                    for piece, a, z in shares[rank][b]
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
    """Return the next-token logits, float32 [vocabulary], of the sequences whose KV is complete.
    Raises Damaged if no token can be chosen by them: a turn that ends so is not saved.
    """
    wanted = {s.logits for s in manifest.sequences if s.logits is not None}
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


def position_faults(directory: Path, manifest: Manifest) -> list[str]:
    """Return what is wrong with the positions that the segments hold, one line each without a
    remedy.

    Damaged where a file does not have the tensors that it must have.
    """
    with opened(directory, manifest) as stored:
        return list(_faults(manifest, [_Piece.of(group, stored) for group in _groups(manifest)]))


def _faults(manifest: Manifest, pieces: "list[_Piece]") -> Iterator[str]:
    """Yield what keeps the pieces from holding each cached position of every sequence exactly
    once.
    """
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
    def rank(self) -> int:
        """The CP rank that wrote it."""
        return self.segments[0].rank

    @property
    def positions(self) -> "torch.Tensor":
        return self.all_positions[self.segments[0].file]


def _groups(manifest: Manifest) -> list[tuple[Segment, ...]]:
    """Return segments by the revision and rank that wrote them: those of a group have the same
    tokens and different KV heads.
    """
    groups: dict[tuple[int, int], list[Segment]] = {}
    for segment in manifest.segments:
        if segment.live:
            groups.setdefault((segment.revision, segment.rank), []).append(segment)
    return [tuple(sorted(groups[key], key=lambda s: s.kv_heads)) for key in sorted(groups)]


def _as_written(pieces: list[_Piece], batch: int, ranks: int) -> bool:
    """Return whether `ranks` ranks wrote the pieces, each an equal part of every sequence and of
    all together. If each takes back its own, what follows has the bits of a run without a break.

    Together, ranks may be a token for each sequence apart that has more tokens than ranks: what
    does not divide goes to the ranks that hold fewest of a sequence, one each.
    """
    written = [[0] * ranks for _ in range(batch)]
    for piece in pieces:
        if piece.rank >= ranks:
            return False
        for b, count in enumerate(piece.live):
            written[b][piece.rank] += count
    together = [sum(counts) for counts in zip(*written, strict=True)]
    long = sum(sum(counts) > ranks for counts in written)
    return all(max(counts) - min(counts) <= 1 for counts in written) and (
        max(together) - min(together) <= max(1, long)
    )


def _own(pieces: list[_Piece], b: int, rank: int, ranks: int) -> list[tuple[_Piece, int, int]]:
    """Return the rows of sequence b of the pieces that rank `rank` wrote."""
    return [
        (piece, piece.before[b], piece.before[b] + piece.live[b])
        for piece in pieces
        if piece.rank == rank and piece.live[b]
    ]


def _even(pieces: list[_Piece], b: int, rank: int, ranks: int) -> list[tuple[_Piece, int, int]]:
    """Return which rows of which pieces rank `rank` takes of sequence b: an equal, contiguous part
    of all its tokens.

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
    stored: dict, piece: _Piece, layer: int, *, rows: tuple[int, int], kv_heads: tuple[int, int]
) -> "torch.Tensor":
    """Return rows [rows[0], rows[1]) of a piece's layer for KV heads [kv_heads[0], kv_heads[1])."""
    import torch

    heads = []
    for segment in piece.segments:
        low, high = segment.kv_heads
        a, z = max(low, kv_heads[0]), min(high, kv_heads[1])
        if a < z:
            heads.append(
                stored[segment.file].get_slice(f"kv.{layer}")[
                    rows[0] : rows[1], :, a - low : z - low
                ]
            )
    return heads[0] if len(heads) == 1 else torch.cat(heads, dim=2)
