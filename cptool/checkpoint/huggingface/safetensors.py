"""Headers of safetensors files, read and checked without mapping the data.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}
and raw bytes; offsets count from the end of the header. As in the format's own reader, the entries
cover the data from its first to its last byte, each byte once. What a header may say is bounded
before anything is computed from it.
"""

import struct
from pathlib import Path
from typing import Any

from cptool.checkpoint.fields import first_line
from cptool.checkpoint.lookalikes import describe
from cptool.checkpoint.tensors import ITEM_SIZES, StoredTensor, bounded_product
from cptool.errors import UserError
from cptool.files import parse_json

# The format's own limit.
_MAX_HEADER_BYTES = 100_000_000

_KEYS = {"dtype", "shape", "data_offsets"}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the file by name; UserError if header or size are wrong."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(512)
        length = struct.unpack_from("<Q", prefix)[0] if len(prefix) >= 8 else 0
        if prefix[8:9] != b"{" and (what := describe(prefix)) is not None:
            raise UserError(f"{path}: not a safetensors file but {what}")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise UserError(
                f"{path}: not a safetensors file (its header length is {length} bytes); fetch the "
                "file again"
            )
        _check_size(path, 8 + length, size)
        file.seek(8)
        text = file.read(length)
    try:
        entries = parse_json(text)
        if not isinstance(entries, dict):
            raise ValueError(f"it is a {type(entries).__name__}, not an object")
        _check_metadata(entries.pop("__metadata__", None))
        tensors = {name: _tensor(path, 8 + length, name, e) for name, e in entries.items()}
        data = _check_cover(tensors, 8 + length)
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: its safetensors header is damaged ({first_line(error)[:200]}); fetch the "
            f"file again"
        ) from None
    _check_size(path, data, size)
    if data < size:
        raise UserError(
            f"{path}: {size} bytes, its header accounts for {data}; fetch the file again"
        )
    return tensors


def _check_metadata(metadata: Any) -> None:
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    ):
        raise ValueError("__metadata__ is not an object of strings")


def _tensor(path: Path, data: int, name: str, entry: Any) -> StoredTensor:
    if not isinstance(entry, dict) or not entry.keys() >= _KEYS:
        raise ValueError(f"the entry of {name[:100]!r} does not have the three fields of a tensor")
    encoding, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(encoding, str) and isinstance(shape, list) and isinstance(offsets, list)):
        raise ValueError(f"the entry of {name[:100]!r} is not that of a tensor")
    if len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise ValueError(f"the data offsets of {name[:100]!r}")
    begin, end = offsets
    elements = bounded_product(shape)
    item_size = ITEM_SIZES.get(encoding)
    if begin > end or (item_size is not None and elements * item_size != end - begin):
        raise ValueError(f"{end - begin} bytes for shape {shape} of {encoding}")
    return StoredTensor(
        file=path,
        offset=data + begin,
        nbytes=end - begin,
        shape=tuple(shape),
        encoding=encoding[:40],
    )


def _check_cover(tensors: dict[str, StoredTensor], start: int) -> int:
    """Return the end of the data; ValueError if entries overlap or leave bytes out."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != start:
            does = "overlaps the one before" if tensor.offset < start else "leaves a hole before it"
            raise ValueError(f"{name[:100]!r} {does}")
        start += tensor.nbytes
    return start


def _check_size(path: Path, expected: int, found: int) -> None:
    if found < expected:
        raise UserError(
            f"{path}: truncated, {expected} bytes expected and {found} found; fetch the file again"
        )
