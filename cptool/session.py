"""KV on disk: append-only segments and an atomically replaced manifest.

A session directory holds `manifest.json` and safetensors segments. A segment is what one rank computed in one turn: for
every layer the K and V of its tokens, with their positions, and perhaps the logits that follow a sequence's last token.
A turn writes new segments, syncs them to disk, and only then replaces the manifest, so a kill at any moment leaves the
previous turn whole. Nothing is ever unpickled.

Positions say what a segment is, so a session saved on any number of ranks resumes on any other: a sequence's tokens,
in the order of the segments, are dealt to the new ranks in equal contiguous shares.
"""

import hashlib
import json
import os
import secrets
from dataclasses import asdict, dataclass
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
    """Which model's KV a session holds: where it was, a fingerprint of its contents, and the shape of its KV."""

    path: str
    fingerprint: str
    layers: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Segment:
    """One file: tokens per sequence that CP rank `rank` added in a turn, for KV heads [kv_heads[0], kv_heads[1])."""

    file: str
    bytes: int
    sha256: str
    turn: int
    rank: int
    kv_heads: tuple[int, int]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Sequence:
    """Everything said so far, how much of it has KV, and the segment with the logits that come next, if they are known."""

    tokens: tuple[int, ...]
    cached: int
    logits: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The state of a session after a turn."""

    model: ModelIdentity
    dtype: str
    cp: int
    tp: int
    turn: int
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
                "segments": tuple(
                    Segment(**{**s, "kv_heads": tuple(s["kv_heads"]), "tokens": tuple(s["tokens"])})
                    for s in fields["segments"]
                ),
            }
        )


def load(directory: Path) -> Manifest:
    """Reads the manifest and checks that every segment is there in full length. UserError in one line otherwise."""
    path = directory / MANIFEST
    try:
        manifest = Manifest.parse(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{directory} holds no session ({MANIFEST} is missing); make one with: cptool prefill MODEL --session DIR"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a readable session manifest ({error}); restore it or prefill anew") from None
    for segment in manifest.segments:
        file = directory / segment.file
        size = file.stat().st_size if file.is_file() else None
        if size != segment.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(f"{file} {found}, the manifest says {segment.bytes} bytes; restore it or prefill anew")
    return manifest


def check_new(directory: Path) -> None:
    """Refuses a directory that a new session would overwrite or mix with other files."""
    if (directory / MANIFEST).exists():
        raise UserError(
            f"{directory} already holds a session; continue it with: cptool decode {directory}, or name a new directory"
        )
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file, a session needs a directory; name another place")
    foreign = [p.name for p in directory.glob("*") if not _is_ours(p)] if directory.is_dir() else []
    if foreign:
        raise UserError(f"{directory} is not empty (it holds {foreign[0]}); a session needs a directory of its own")


def check_model(manifest: Manifest, fingerprint: str, model: str) -> None:
    """Refuses another model's KV."""
    if manifest.model.fingerprint != fingerprint:
        raise UserError(
            f"{model} is not the model of this session (fingerprint {fingerprint[:12]}, the session's is "
            f"{manifest.model.fingerprint[:12]}); pass the original with --model, or prefill anew"
        )


def write_segment(
    directory: Path, cache: "KVCache", since: list[int], *, turn: int, rank: int, kv_heads: tuple[int, int],
    logits: "dict[int, torch.Tensor]",
) -> Segment | None:
    """Writes what `cache` holds beyond `since` tokens of each sequence, and next-token logits by sequence.

    Returns None, and writes nothing, where there is nothing to write. The file is on disk when this returns, but no
    manifest names it yet.
    """
    import torch
    from safetensors.torch import save_file

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
    # The random part keeps two runs that start from the same turn from writing over each other's files.
    name = f"segment-{turn:05d}-{rank:03d}-{kv_heads[0]:03d}-{secrets.token_hex(4)}.safetensors"
    temporary = directory / f"{name}.tmp"
    save_file({key: tensor.cpu() for key, tensor in tensors.items()}, temporary)
    _sync(temporary)
    temporary.rename(directory / name)
    return Segment(
        file=name, bytes=(directory / name).stat().st_size, sha256=_sha256(directory / name),
        turn=turn, rank=rank, kv_heads=kv_heads, tokens=tuple(tokens),
    )


def commit(directory: Path, manifest: Manifest) -> None:
    """Makes `manifest` the state of the session in one atomic step, then removes files that no turn needs.

    Raises RuntimeError if another run has committed a turn since this one began.
    """
    path = directory / MANIFEST
    found = Manifest.parse(path.read_text()).turn if path.exists() else 0
    if found != manifest.turn - 1:
        raise RuntimeError(
            f"{directory} was changed by another run (it is at turn {found}, this run began at {manifest.turn - 1}); "
            "this turn was not saved"
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
    directory: Path, manifest: Manifest, cache: "KVCache", *, rank: int, ranks: int, kv_heads: tuple[int, int],
    reserve: int = 0,
) -> "tuple[Placement, ...]":
    """Fills an empty cache with this rank's share of the session and returns what every rank holds.

    KV heads [kv_heads[0], kv_heads[1]) are read, and room is kept for `reserve` more tokens of each sequence. The
    segments that are read are verified against their checksums before the cache is touched.
    """
    import torch
    from safetensors import safe_open

    from cptool.sharding import Placement

    pieces = _pieces(manifest)
    batch = len(manifest.sequences)
    files = {s.file: safe_open(directory / s.file, framework="pt") for s in manifest.segments}
    # shares[r][b]: (piece, first, last) in the order of the segments, indices within the piece's tensors.
    shares = [[_share(pieces, b, r, ranks) for b in range(batch)] for r in range(ranks)]

    mine = {s.file: s for b in range(batch) for piece, _, _ in shares[rank][b] for s in piece}
    for segment in mine.values():
        if _sha256(directory / segment.file) != segment.sha256:
            raise UserError(
                f"{directory / segment.file} does not match its checksum; the file is damaged: restore it or prefill anew"
            )

    positions = {piece[0].file: files[piece[0].file].get_tensor("positions") for piece in pieces}
    placements, order = [], None
    for r in range(ranks):
        rows = [
            torch.cat([positions[p[0].file][a:z] for p, a, z in share] or [torch.empty(0, dtype=torch.int32)])
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


def _pieces(manifest: Manifest) -> list[tuple[Segment, ...]]:
    """Segments that hold different KV heads of the same tokens, together, in the order of their first heads."""
    groups: dict[tuple[int, int], list[Segment]] = {}
    for segment in manifest.segments:
        groups.setdefault((segment.turn, segment.rank), []).append(segment)
    return [tuple(sorted(groups[key], key=lambda s: s.kv_heads)) for key in sorted(groups)]


def _share(pieces: list[tuple[Segment, ...]], b: int, rank: int, ranks: int):
    """Which rows of which pieces rank `rank` takes of sequence b: an equal, contiguous part of all its tokens."""
    total = sum(piece[0].tokens[b] for piece in pieces)
    first, last = total * rank // ranks, total * (rank + 1) // ranks
    found, seen = [], 0
    for piece in pieces:
        count, before = piece[0].tokens[b], sum(piece[0].tokens[:b])
        a, z = max(first - seen, 0), min(last - seen, count)
        if a < z:
            found.append((piece, before + a, before + z))
        seen += count
    return found


def _read(files, piece: tuple[Segment, ...], layer: int, first: int, last: int, kv_heads: tuple[int, int]):
    """Rows [first, last) of a piece's layer for KV heads [kv_heads[0], kv_heads[1])."""
    import torch

    heads = []
    for segment in piece:
        low, high = segment.kv_heads
        a, z = max(low, kv_heads[0]), min(high, kv_heads[1])
        if a < z:
            heads.append(files[segment.file].get_slice(f"kv.{layer}")[first:last, :, a - low : z - low])
    return heads[0] if len(heads) == 1 else torch.cat(heads, dim=2)


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
