"""Headers of files that `torch.save` wrote, read without torch and without mapping the data.

A file is a ZIP archive of uncompressed records: `NAME/data.pkl`, a pickle of the tensors' shapes,
and `NAME/data/KEY`, the raw bytes of each storage. The pickle is read by `pickled_tensors`.
"""

import struct
import zipfile
from pathlib import Path

from cptool.checkpoint.fields import first_line
from cptool.checkpoint.lookalikes import describe
from cptool.checkpoint.meta.pickled_tensors import PickledTensor, read_tensors
from cptool.checkpoint.tensors import ITEM_SIZES, StoredTensor, bounded_product
from cptool.errors import UserError

# Llama 3.1 405B takes 100 KB.
_MAX_PICKLE_BYTES = 32_000_000

# The archive's directory takes some 100 bytes a record, and a record is a tensor.
_MAX_DIRECTORY_BYTES = 64_000_000

# A record's own header: its signature, fields that the archive's directory repeats, and the lengths
# of name and padding, which the data follows.
_RECORD = struct.Struct("<4s22xHH")

# The end of an archive: a record of 22 bytes, a comment of up to 65,535, and the records of ZIP64.
_END_SEARCHED = 22 + 65_535 + 20 + 56


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the file by name; UserError if it is damaged or holds anything else.

    A tensor in a type that no Llama is computed in has the name of its storage as `encoding`.
    """
    with path.open("rb") as file:
        beginning = file.read(512)
    if not beginning.startswith(b"PK") and (what := describe(beginning)) is not None:
        raise UserError(f"{path}: not a file of tensors as torch.save writes it but {what}")
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            return _Archive(path, archive).tensors()
    except (UserError, OSError):
        raise
    except Exception as error:  # Damaged archives and pickles raise anything.
        raise UserError(
            f"{path}: not a whole file of tensors as torch.save writes it ({first_line(error)}); "
            f"fetch it again, or save only its tensors"
        ) from None


class _Archive:
    """The records of a file, by name."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        self.size = path.stat().st_size
        self.records = {record.filename: record for record in archive.infolist()}
        pickles = [name for name in self.records if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} records data.pkl")
        self.prefix = pickles[0].removesuffix("data.pkl")

    def tensors(self) -> dict[str, StoredTensor]:
        """Return all tensors of the file."""
        order = self.prefix + "byteorder"
        if order in self.records and self._content(order) != b"little":
            raise ValueError("its numbers are big-endian")
        tensors = read_tensors(self._content(self.prefix + "data.pkl"))
        return {name: self._stored(name, tensor) for name, tensor in tensors.items()}

    def _content(self, name: str) -> bytes:
        record = self.records[name]
        if record.file_size > _MAX_PICKLE_BYTES:
            raise ValueError(f"record {name} has {record.file_size} bytes")
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"record {name} is compressed")
        return self.archive.read(name)

    def _stored(self, name: str, tensor: PickledTensor) -> StoredTensor:
        shape, length = tensor.shape, tensor.storage.length
        elements = bounded_product(shape)
        if elements + tensor.offset > length:
            raise ValueError(f"{name!r}: shape {list(shape)} in a storage of {length}")
        if tensor.stride != _contiguous(shape):
            raise ValueError(f"{name!r} is not contiguous")
        record = self.records.get(f"{self.prefix}data/{tensor.storage.key}")
        if record is None:
            raise ValueError(f"record data/{tensor.storage.key} of {name!r} is missing")
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name!r} is compressed")
        encoding = tensor.storage.encoding
        item = ITEM_SIZES.get(encoding)
        if item is None:
            return StoredTensor(file=self.path, offset=0, nbytes=0, shape=shape, encoding=encoding)
        if record.file_size != length * item:
            raise ValueError(f"{name!r}: {record.file_size} bytes for {length} of {encoding}")
        offset = self._data_of(record) + tensor.offset * item
        return StoredTensor(
            file=self.path, offset=offset, nbytes=elements * item, shape=shape, encoding=encoding
        )

    def _data_of(self, record: zipfile.ZipInfo) -> int:
        """Return the offset in the file at which the data of a record begins."""
        file = self.archive.fp
        assert file is not None  # open as long as this object is used
        file.seek(record.header_offset)
        signature, name_length, padding = _RECORD.unpack(file.read(_RECORD.size))
        start = record.header_offset + _RECORD.size + name_length + padding
        if signature != b"PK\3\4" or start + record.file_size > self.size:
            raise ValueError(f"record {record.filename} is not where the directory says")
        return start


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def _check_directory(path: Path) -> None:
    """Refuse an archive whose directory is larger than that of any file of tensors.

    The reader of the standard library makes an object of every entry.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - _END_SEARCHED, 0))
        tail = file.read()
        at = tail.rfind(b"PK\5\6")
        if at < 0 or len(tail) < at + 22:
            raise ValueError("its end is missing, which lists the records")
        (length,) = struct.unpack_from("<I", tail, at + 12)
        if length == 0xFFFFFFFF:  # The numbers are in the record of ZIP64 before it.
            at = tail.rfind(b"PK\6\6", 0, at)
            if at < 0 or len(tail) < at + 56:
                raise ValueError("its end is damaged, which lists the records")
            (length,) = struct.unpack_from("<Q", tail, at + 40)
    if length > _MAX_DIRECTORY_BYTES:
        raise ValueError(f"its list of records has {length} bytes")
