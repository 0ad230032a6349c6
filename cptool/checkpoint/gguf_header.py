"""The header of a GGUF file: metadata and tensor table, every length checked against the file.

Layout (versions 2 and 3, little-endian): magic, version, tensor and metadata counts; metadata as
(key, type, value); tensors as (name, dimensions, type, offset); aligned data. The reader of the
`gguf` package is exact too, but makes an array object of every string and trusts every length.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from cptool.checkpoint.base import StoredTensor
from cptool.errors import UserError

_SCALARS = dict(zip([*range(8), 10, 11, 12], "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class Header:
    """Metadata by key and tensors by their GGUF names, shapes in row-major order."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(path: Path) -> Header:
    """Reads and checks the header; UserError for another format, a truncated or a damaged file."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file; give one, or a model directory")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Cursor(path, data).header()
            except (ValueError, KeyError, UnicodeDecodeError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"{path}: its GGUF header is damaged ({error}); fetch the file again"
                ) from None


class _Cursor:
    """A position in the file, moved by what it reads and never past the end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.size = path, data, len(data)
        self.position = 4

    def header(self) -> Header:
        version = self.scalar("I")
        if version not in (2, 3):
            raise UserError(
                f"{self.path}: GGUF version {version} is not supported, little-endian 2 and 3 are; "
                f"convert the model anew"
            )
        tensor_count, metadata_count = self.scalar("Q"), self.scalar("Q")
        metadata = {}
        for _ in range(metadata_count):
            key = self.string()
            metadata[key] = self.value(self.scalar("I"))
        table = [self.tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"alignment {alignment!r}")
        start = -(-self.position // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in table:
            tensors[name] = self.stored(name, shape, kind, start + offset)
        self.need(max((t.offset + t.nbytes for t in tensors.values()), default=0) - self.position)
        return Header(metadata, tensors)

    def need(self, count: int) -> None:
        if self.position + count > self.size:
            raise UserError(
                f"{self.path}: truncated or damaged, at least {self.position + count} bytes "
                f"expected and {self.size} found; fetch the file again"
            )

    def scalar(self, code: str) -> Any:
        return self.scalars(code, 1)[0]

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{code}") * count
        self.need(size)
        values = struct.unpack_from(f"<{count}{code}", self.data, self.position)
        self.position += size
        return values

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """Vocabularies hold hundreds of thousands of these, hence one loop with local names."""
        self.need(8 * count)
        length_at = struct.Struct("<Q").unpack_from
        data, position, size = self.data, self.position, self.size
        values = []
        for _ in range(count):
            if position + 8 > size:
                break
            start = position + 8
            position = start + length_at(data, position)[0]
            values.append(data[start:position].decode("utf-8"))
        self.position = position
        self.need(8 * (count - len(values)))
        return values

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            return self.strings(count)
        if kind not in _SCALARS:
            raise ValueError(f"an array of type {kind}")
        return list(self.scalars(_SCALARS[kind], count))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.string(), self.scalar("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(reversed(self.scalars("Q", dimensions)))
        return name, shape, self.scalar("I"), self.scalar("Q")

    def stored(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
        encoding = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[encoding]
        elements = 1
        for extent in shape:
            elements *= extent
        if not shape or shape[-1] % block:
            raise ValueError(f"tensor {name!r}: shape {list(shape)} in blocks of {block}")
        nbytes = elements // block * block_bytes
        return StoredTensor(self.path, offset, nbytes, shape, encoding.name)
