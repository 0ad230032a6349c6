"""KV on disk: append-only segments and an atomically replaced manifest.

A session directory holds `manifest.json` and safetensors segments. A segment is what one rank
computed in one turn: for every layer the K and V of its tokens, with their positions, and perhaps
the logits that follow a sequence's last token. A turn writes new segments, syncs them to disk, and
only then replaces the manifest, so a kill at any moment leaves the previous turn whole. Going back
writes a manifest alone: it says from which position on a segment no longer counts. Nothing is ever
unpickled.

Positions say what a segment is, so a session saved on any number of ranks resumes on any other: a
sequence's tokens, in the order of the segments, are dealt to the new ranks in equal contiguous
shares.
"""

import hashlib
import json
import os
import secrets
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from operator import le
from pathlib import Path
from typing import TYPE_CHECKING

from cptool.errors import UserError

if TYPE_CHECKING:
    import torch

    from cptool.cache import KVCache
    from cptool.sharding import Placement

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ModelIdentity:
    """Which model's KV a session holds: where it was, a fingerprint of its contents, and the shape
    of its KV.
    """

    path: str
    fingerprint: str
    layers: int
    kv_heads: int
    head_dim: int


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
        return any(n and a < z for n, a, z in zip(self.tokens, self.start, self.until))


@dataclass(frozen=True)
class Sequence:
    """Everything said so far, how much of it has KV, and the segment with the logits that come
    next, if they are known.
    """

    tokens: tuple[int, ...]
    cached: int
    logits: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The state of a session.

    `revision` counts what was ever committed. `turns[t][b]` is the number of tokens of sequence b
    after turn t + 1.
    """

    model: ModelIdentity
    dtype: str
    cp: int
    tp: int
    revision: int
    turns: tuple[tuple[int, ...], ...]
    sequences: tuple[Sequence, ...]
    segments: tuple[Segment, ...] = ()

    def dump(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":"))

    @staticmethod
    def parse(text: str) -> "Manifest":
        """Raises ValueError, KeyError or TypeError if the text is not a manifest of this format."""
        fields = json.loads(text)
        version = fields.pop("format")
        if version != FORMAT:
            raise ValueError(f"it has format {version}, this cptool reads format {FORMAT}")
        for segment in fields["segments"]:
            if Path(segment["file"]).name != segment["file"]:
                raise ValueError(f"segment {segment['file']!r} is not in the session's directory")
        return Manifest(
            **{
                **fields,
                "model": ModelIdentity(**fields["model"]),
                "sequences": tuple(
                    Sequence(**{**s, "tokens": tuple(s["tokens"])}) for s in fields["sequences"]
                ),
                "turns": tuple(map(tuple, fields["turns"])),
                "segments": tuple(
                    Segment(
                        **{name: tuple(v) if isinstance(v, list) else v for name, v in s.items()}
                    )
                    for s in fields["segments"]
                ),
            }
        )

    def truncated(self, lengths: list[int]) -> "Manifest":
        """The state in which sequence b has said its first `lengths[b]` tokens alone; nothing on
        disk changes.

        Where a sequence gets shorter, what follows its new end is not known any more: the KV of its
        last token is given up, so that the next turn computes it again.
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


def load(directory: Path) -> Manifest:
    """Reads the manifest and checks that every segment is there in full length. UserError in one
    line otherwise.
    """
    path = directory / MANIFEST
    try:
        manifest = Manifest.parse(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{directory} holds no session ({MANIFEST} is missing); make one with: cptool prefill "
            "MODEL --session DIR"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a readable session manifest ({error}); restore it or prefill anew"
        ) from None
    for segment in manifest.segments:
        file = directory / segment.file
        size = file.stat().st_size if file.is_file() else None
        if size != segment.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(
                f"{file} {found}, the manifest says {segment.bytes} bytes; restore it or prefill "
                "anew"
            )
    return manifest


def exists(directory: Path) -> bool:
    """Whether there is a session, sound or not."""
    return (directory / MANIFEST).exists()


def common_prefix(
    directory: Path, manifest: Manifest, prompts: list[list[int]], rewind: bool
) -> list[int]:
    """How many tokens each whole prompt shares with the session.

    UserError if a prompt does not begin with all that its sequence says, unless `rewind`.
    """
    if len(prompts) != len(manifest.sequences):
        raise UserError(
            f"{len(prompts)} prompts for {directory}, which holds {len(manifest.sequences)} "
            "sequences; give one for each, "
            "or name a new directory"
        )
    lengths = []
    for b, (prompt, sequence) in enumerate(zip(prompts, manifest.sequences), 1):
        pairs = zip(prompt, sequence.tokens)
        shared = next(
            (i for i, (new, old) in enumerate(pairs) if new != old),
            min(len(prompt), len(sequence.tokens)),
        )
        if shared < len(sequence.tokens) and not rewind:
            ends = "ends" if shared == len(prompt) else "differs"
            raise UserError(
                f"sequence {b}: the prompt {ends} at token {shared}, {directory} holds "
                f"{len(sequence.tokens)}; a prompt must "
                "begin with all of them: add --rewind to go back to there, or name a new directory"
            )
        lengths.append(shared)
    return lengths


def check_new(directory: Path) -> None:
    """Refuses a directory that a new session would mix with other files."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file, a session needs a directory; name another place")
    foreign = [p.name for p in directory.glob("*") if not _is_ours(p)] if directory.is_dir() else []
    if foreign:
        raise UserError(
            f"{directory} is not empty (it holds {foreign[0]}); a session needs a directory of its "
            "own"
        )


def check_model(manifest: Manifest, fingerprint: str, model: str) -> None:
    """Refuses another model's KV."""
    if manifest.model.fingerprint != fingerprint:
        raise UserError(
            f"{model} is not the model of this session (fingerprint {fingerprint[:12]}, the "
            "session's is "
            f"{manifest.model.fingerprint[:12]}); pass the original with --model, or prefill anew"
        )


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

    lengths = cache.lengths
    tokens = [length - first for length, first in zip(lengths, since)]
    if not any(tokens) and not logits:
        return None
    tensors = {f"logits.{b}": row.contiguous() for b, row in logits.items()}
    held = cache.held.sequences()
    tensors["positions"] = torch.cat([p[first:] for p, first in zip(held, since)])
    for layer in range(cache.layers):
        parts = [cache.tokens_from(layer, b, first) for b, first in enumerate(since)]
        tensors[f"kv.{layer}"] = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    # The random part keeps two runs that start from the same turn from writing over each other's
    # files.
    name = f"segment-{revision:05d}-{rank:03d}-{kv_heads[0]:03d}-{secrets.token_hex(4)}.safetensors"
    temporary = directory / f"{name}.tmp"
    try:
        safetensors.torch.save_file(
            {key: tensor.cpu() for key, tensor in tensors.items()}, temporary
        )
        _sync(temporary)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{temporary} cannot be written ({error}); the session is as it was"
        ) from None
    temporary.rename(directory / name)
    return Segment(
        file=name,
        bytes=(directory / name).stat().st_size,
        sha256=_sha256(directory / name),
        revision=revision,
        rank=rank,
        kv_heads=kv_heads,
        tokens=tuple(tokens),
        start=tuple(start),
        until=tuple(until),
    )


def commit(directory: Path, manifest: Manifest) -> None:
    """Makes `manifest` the state of the session in one atomic step, then removes files that it does
    not name.

    Raises RuntimeError if another run has committed since this one began.
    """
    path = directory / MANIFEST
    found = Manifest.parse(path.read_text()).revision if path.exists() else 0
    if found != manifest.revision - 1:
        raise RuntimeError(
            f"{directory} was changed by another run (it is at revision {found}, this run began at "
            f"{manifest.revision - 1}); what this run computed was not saved"
        )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(manifest.dump())
    _sync(temporary)
    temporary.replace(path)
    _sync(directory)
    named = {segment.file for segment in manifest.segments}
    for file in directory.glob("segment-*"):
        if file.name not in named:
            file.unlink(missing_ok=True)


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
    sequence. The segments that are read are verified against their checksums before the cache is
    touched.
    """
    import torch
    from safetensors import safe_open

    from cptool.sharding import Placement

    batch = len(manifest.sequences)
    files = {s.file: safe_open(directory / s.file, framework="pt") for s in manifest.segments}
    pieces = [_Piece.of(group, files) for group in _groups(manifest)]
    # shares[r][b]: (piece, first, last) in the order of the segments, rows of the piece's tensors.
    shares = [[_share(pieces, b, r, ranks) for b in range(batch)] for r in range(ranks)]

    mine = {
        s.file: s for b in range(batch) for piece, _, _ in shares[rank][b] for s in piece.segments
    }
    for segment in mine.values():
        check_digest(directory, segment)

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
    for layer in range(cache.layers):
        parts = []
        for b in range(batch):
            rows = [_read(files, piece, layer, a, z, kv_heads) for piece, a, z in shares[rank][b]]
            if rows:
                parts.append(torch.cat(rows)[order[b]])
        if parts:
            kv = torch.cat(parts).to(cache.device)
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
    """
    total = sum(piece.live[b] for piece in pieces)
    first, last = total * rank // ranks, total * (rank + 1) // ranks
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


def check_digest(directory: Path, segment: Segment) -> None:
    """UserError if a segment's contents are not what was written."""
    file = directory / segment.file
    if _sha256(file) != segment.sha256:
        raise UserError(
            f"{file} does not match its checksum; the file is damaged: restore it or prefill anew"
        )


def _is_ours(path: Path) -> bool:
    return path.name.startswith("segment-") or path.name.startswith("manifest.")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
