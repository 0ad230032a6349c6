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
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cptool import files
from cptool.errors import RunError
from cptool.files import sha256
from cptool.session.manifest import REMEDY, Damaged, Manifest, Segment
from cptool.session.store import check_size

if TYPE_CHECKING:
    import torch

    from cptool.cache import KVCache

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
    """Return a new file with the lock of a running process on it."""
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
    """Return the beginning of a safetensors file with these tensors, one after the other.

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
    """Return the bytes of a contiguous tensor in host memory; nothing is copied."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def opened(
    directory: Path, manifest: Manifest, names: Container[str] | None = None
) -> Iterator[dict]:
    """Open the segments' files, or those in `names`, and yield them by name.

    Raises Damaged unless each has the tensors that the manifest lists.
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


def _check_tensors(manifest: Manifest, segment: Segment, file: Any) -> None:
    """Raise ValueError unless the file has the tensors of a segment, in their dtypes and shapes."""
    model, rows = manifest.model, sum(segment.tokens)
    heads = segment.kv_heads[1] - segment.kv_heads[0]
    stored = STORED_AS[manifest.kv_dtype]
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
