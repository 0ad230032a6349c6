"""Headers of safetensors files, read and checked without mapping the data.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}
and raw bytes; offsets count from the end of the header.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any

from cptool.checkpoint.base import ITEM_SIZES, StoredTensor
from cptool.errors import UserError

# The format's own limit.
_MAX_HEADER_BYTES = 100_000_000


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the file by name; UserError where the header or the file's size is wrong."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise UserError(
                f"{path}: not a safetensors file (its header length is {length} bytes); fetch the "
                "file again"
            )
        _check_size(path, 8 + length, size)
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: _tensor(path, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: its safetensors header is damaged ({error}); fetch the file again"
        ) from None
    _check_size(path, max((t.offset + t.nbytes for t in tensors.values()), default=0), size)
    return tensors


def _tensor(path: Path, data: int, entry: dict[str, Any]) -> StoredTensor:
    encoding, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or begin > end:
        raise ValueError(f"shape {list(shape)}, data offsets {begin} to {end}")
    item_size = ITEM_SIZES.get(encoding)
    if item_size is not None and math.prod(shape) * item_size != end - begin:
        raise ValueError(f"{end - begin} bytes for shape {list(shape)} of {encoding}")
    return StoredTensor(path, data + begin, end - begin, shape, str(encoding))


def _check_size(path: Path, expected: int, found: int) -> None:
    if found < expected:
        raise UserError(
            f"{path}: truncated, {expected} bytes expected and {found} found; fetch the file again"
        )
