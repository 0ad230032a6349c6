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

from cptool.checkpoint.fields import first_line, readable
from cptool.checkpoint.lookalikes import describe
from cptool.checkpoint.tensors import StoredTensor, bounded_product
from cptool.errors import UserError

_SCALARS = dict(zip([*range(8), 10, 11, 12], "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4

# Vocabularies of 300,000 tokens have 500,000 merges; nothing has more elements. A sparse file makes
# any count look possible, and a list of four thousand million numbers takes 100 GB.
_MAX_ELEMENTS, _MAX_KEYS, _MAX_TENSORS = 2**23, 2**16, 2**20
_MAX_NAME_BYTES, _MAX_STRING_BYTES, _MAX_METADATA_BYTES = 2**16, 2**26, 2**30

# Types that are no more or never were in llama.cpp's own files.
_OTHER_TYPES = {
    4: "Q4_2, removed",
    5: "Q4_3, removed",
    31: "Q4_0_4_4, removed",
    32: "Q4_0_4_8, removed",
    33: "Q4_0_8_8, removed",
    36: "IQ4_NL_4_4, removed",
    37: "IQ4_NL_4_8, removed",
    38: "IQ4_NL_8_8, removed",
    97: "of ik_llama.cpp",
    133: "of ik_llama.cpp",
    134: "of ik_llama.cpp",
    137: "of ik_llama.cpp",
    138: "of ik_llama.cpp",
    139: "of ik_llama.cpp",
    140: "of ik_llama.cpp",
    141: "of ik_llama.cpp",
}


_KNOWN_TYPES = frozenset(map(int, GGMLQuantizationType))


@dataclass(frozen=True)
class Header:
    """Metadata by key and tensors by their GGUF names, shapes in row-major order."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(path: Path) -> Header:
    """Read and check the header; UserError for another format, a truncated or a damaged file."""
    with path.open("rb") as file:
        beginning = file.read(512)
        if not beginning.startswith(b"GGUF"):
            what = describe(beginning)
            raise UserError(
                f"{path}: not a GGUF file{(what and f' but {what}') or ''}; give a GGUF file, or a "
                f"model directory"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Cursor(path, data).header()
            except (ValueError, KeyError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"{path}: its GGUF header is damaged ({first_line(error)[:200]}); fetch the "
                    f"file again"
                ) from None


class _Cursor:
    """A position in the file, moved by what it reads and never past the end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size = path, data, len(data)
        self.position, self.elements = 4, 0

    def header(self) -> Header:
        """Read the whole header."""
        version = self.scalar("I")
        if version in (2 << 24, 3 << 24):
            raise UserError(
                f"{self.path}: a big-endian GGUF file, which is not supported; convert the model "
                f"anew, or with gguf's gguf-convert-endian"
            )
        if version not in (2, 3):
            raise UserError(
                f"{self.path}: GGUF version {version} is not supported, little-endian 2 and 3 are; "
                f"convert the model anew"
            )
        tensor_count, metadata_count = self.scalar("Q"), self.scalar("Q")
        self.need(12 * metadata_count + 24 * tensor_count)
        if metadata_count > _MAX_KEYS or tensor_count > _MAX_TENSORS:
            raise ValueError(f"{metadata_count} keys and {tensor_count} tensors")
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = self.string(_MAX_NAME_BYTES)
            if key in metadata:
                raise ValueError(f"key {readable(key)} is in it twice")
            metadata[key] = self.value(self.scalar("I"))
            if self.position > _MAX_METADATA_BYTES:
                raise ValueError(f"metadata of more than {_MAX_METADATA_BYTES} bytes")
        table = [self.tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"alignment {alignment!r}")
        start = -(-self.position // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in table:
            if name in tensors:
                raise ValueError(f"tensor {readable(name)} is in it twice")
            tensors[name] = self.stored(name, shape, kind, start + offset)
        self.need(max((t.offset + t.nbytes for t in tensors.values()), default=0) - self.position)
        end = start
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < end:
                raise ValueError(f"tensor {readable(name)} overlaps the one before")
            end = tensor.offset + tensor.nbytes
        return Header(metadata, tensors)

    def need(self, count: int) -> None:
        """Raise UserError unless the file has `count` more bytes."""
        if self.position + count > self.size:
            raise UserError(
                f"{self.path}: truncated or damaged, at least {self.position + count} bytes "
                f"expected and {self.size} found; fetch the file again"
            )

    def has(self, count: int) -> bool:
        """Return whether the file has `count` more bytes."""
        return self.position + count <= self.size

    def scalar(self, code: str) -> Any:
        """Read a number of a type of `struct`."""
        return self.scalars(code, 1)[0]

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        """Read numbers of a type of `struct`."""
        size = struct.calcsize(f"<{code}") * count
        self.need(size)
        values = struct.unpack_from(f"<{count}{code}", self.data, self.position)
        self.position += size
        return values

    def string(self, limit: int = _MAX_STRING_BYTES) -> str:
        """Read a string of at most `limit` bytes."""
        (length,) = struct.unpack_from("<Q", self.data, self.position) if self.has(8) else (0,)
        if length > limit:
            self.need(8 + length)
            raise ValueError(f"a string of {length} bytes")
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """Read strings.

        Vocabularies hold hundreds of thousands of these, hence one loop with local names.
        """
        self.need(8 * count)
        length_at = struct.Struct("<Q").unpack_from
        data, position, size = self.data, self.position, self.size
        values = []
        for _ in range(count):
            if position + 8 > size:
                break
            start = position + 8
            position = start + length_at(data, position)[0]
            if position - self.position > _MAX_METADATA_BYTES:
                break
            values.append(data[start:position].decode("utf-8"))
        if len(values) < count:
            self.position = min(position, self.size)
            self.need(position - self.position + 8)
            raise ValueError(f"strings of more than {_MAX_METADATA_BYTES} bytes")
        self.position = position
        self.need(0)
        return values

    def value(self, kind: int) -> Any:
        """Read a value of a GGUF type: a number, a string or a list of these."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        size = 8 if kind == _STRING else struct.calcsize(f"<{_SCALARS.get(kind, 'B')}")
        self.need(size * count)
        self.elements += count
        if self.elements > _MAX_ELEMENTS:
            raise ValueError(f"an array of {count} elements")
        if kind == _STRING:
            return self.strings(count)
        if kind not in _SCALARS:
            raise ValueError(f"an array of type {kind}")
        return list(self.scalars(_SCALARS[kind], count))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read name, shape, type and offset of a tensor."""
        name, dimensions = self.string(_MAX_NAME_BYTES), self.scalar("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {readable(name)} has {dimensions} dimensions")
        shape = tuple(reversed(self.scalars("Q", dimensions)))
        return name, shape, self.scalar("I"), self.scalar("Q")

    def stored(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
        """Return a tensor of the file, whose size follows from shape and type."""
        if kind not in _KNOWN_TYPES:
            said = f" ({_OTHER_TYPES[kind]})" if kind in _OTHER_TYPES else ""
            raise UserError(
                f"{self.path}: tensor {readable(name)} is of type {kind}{said}, which is not "
                f"supported; use a GGUF of the model in another quantisation"
            )
        encoding = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[encoding]
        elements = bounded_product(shape)
        if not shape or shape[-1] % block:
            raise ValueError(f"tensor {readable(name)}: shape {list(shape)} in blocks of {block}")
        nbytes = elements // block * block_bytes
        return StoredTensor(
            file=self.path, offset=offset, nbytes=nbytes, shape=shape, encoding=encoding.name
        )
