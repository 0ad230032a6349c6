"""Where a checkpoint's tensors are stored and how they are encoded."""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Encodings that torch reads as they are stored; all others are quantised.
TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}

_SAMPLED_BYTES = 4096

# More than any tensor of a checkpoint has.
_MAX_DIMENSIONS = 8


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor that is stored in one piece.

    `offset` and `nbytes` locate it in `file`. `shape` is the logical shape, `encoding` a
    safetensors or GGML type name. `interleaved_heads` is the number of heads whose rows are in
    interleaved rotary order, 0 if the rows are in half-split order. `added` is what the model adds
    to every element.
    """

    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    encoding: str
    interleaved_heads: int = 0
    added: float = 0.0


@dataclass(frozen=True)
class JoinedTensor:
    """A tensor whose parts are stored in several files, side by side along dimension `dim`."""

    parts: tuple[StoredTensor, ...]
    dim: int
    interleaved_heads: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape of the whole."""
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    @property
    def encoding(self) -> str:
        """The encoding of all parts."""
        return self.parts[0].encoding

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts."""
        return sum(part.nbytes for part in self.parts)


AnyTensor = StoredTensor | JoinedTensor


def parts(tensor: AnyTensor) -> tuple[StoredTensor, ...]:
    """Return the pieces in which a tensor is stored."""
    return tensor.parts if isinstance(tensor, JoinedTensor) else (tensor,)


def bounded_product(shape: Iterable[Any]) -> int:
    """Return the number of elements of a shape that a file states.

    Raises ValueError for a shape that no tensor has. Integers of any size cost no more than
    reading them.
    """
    shape = list(shape)
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"a shape of {len(shape)} dimensions")
    if not all(type(extent) is int and 0 <= extent < 2**63 for extent in shape):
        raise ValueError("a shape with an extent that no tensor has")
    product = math.prod(shape)
    if product >= 2**63:
        raise ValueError(f"a shape {shape} of {product} elements")
    return product


def byte_ranges(tensor: AnyTensor, start: int, stop: int) -> Iterator[tuple[Path, int, int]]:
    """Yield file, offset and count for the bytes [start, stop) of a tensor, in its own order."""
    rows = math.prod(tensor.shape[: tensor.dim]) if isinstance(tensor, JoinedTensor) else 1
    width = tensor.nbytes // rows
    for row in range(start // width, -(-stop // width)):
        begin = row * width
        for part in parts(tensor):
            share = part.nbytes // rows
            first, last = max(start - begin, 0), min(stop - begin, share)
            if first < last:
                yield part.file, part.offset + row * share + first, last - first
            begin += share


def differ(a: AnyTensor, b: AnyTensor) -> bool:
    """Return whether two tensors differ in shape, in encoding, or in a sample of their bytes."""
    if (a.shape, a.encoding, a.nbytes) != (b.shape, b.encoding, b.nbytes):
        return True
    length = min(a.nbytes, _SAMPLED_BYTES)
    starts = {(a.nbytes - length) * i // 63 for i in range(64)}
    with ExitStack() as opened:
        files = cache(lambda path: opened.enter_context(path.open("rb")))

        def sample(tensor: AnyTensor, start: int) -> bytes:
            pieces = []
            for path, offset, count in byte_ranges(tensor, start, start + length):
                files(path).seek(offset)
                pieces.append(files(path).read(count))
            return b"".join(pieces)

        return any(sample(a, start) != sample(b, start) for start in sorted(starts))
