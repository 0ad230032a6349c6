"""Headers of files that `torch.save` wrote, read without torch and without mapping the data.

A file is a ZIP archive of uncompressed records: `NAME/data.pkl`, a pickle of the tensors' shapes,
and `NAME/data/KEY`, the raw bytes of each storage. A pickle is a program, so the one here may call
nothing but stand-ins, which note what it says of a tensor.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cptool.checkpoint.base import ITEM_SIZES, StoredTensor, first_line
from cptool.errors import UserError

_ENCODINGS = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}

# Llama 3.1 405B takes 100 KB.
_MAX_PICKLE_BYTES = 100_000_000

# A record's own header: its signature, fields that the archive's directory repeats, and the lengths
# of name and padding, which the data follows.
_RECORD = struct.Struct("<4s22xHH")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the file by name; UserError where it is damaged or holds anything else.

    A tensor in a type that no Llama is computed in has the name of its storage as `encoding`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(path, archive).tensors()
    except (UserError, OSError):
        raise
    except Exception as error:  # Damaged archives and pickles raise anything.
        raise UserError(
            f"{path}: not a whole file of tensors as torch.save writes it ({first_line(error)}); "
            f"fetch it again"
        ) from None


class _Archive:
    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self.archive = path, archive
        self.size = path.stat().st_size
        self.records = {record.filename: record for record in archive.infolist()}
        pickles = [name for name in self.records if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} records data.pkl")
        self.prefix = pickles[0].removesuffix("data.pkl")

    def tensors(self) -> dict[str, StoredTensor]:
        order = self.prefix + "byteorder"
        if order in self.records and self._content(order) != b"little":
            raise ValueError("its numbers are big-endian")
        state = _Unpickler(io.BytesIO(self._content(self.prefix + "data.pkl"))).load()
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, not tensors by name")
        return {str(name): self._stored(str(name), value) for name, value in state.items()}

    def _content(self, name: str) -> bytes:
        if self.records[name].file_size > _MAX_PICKLE_BYTES:
            raise ValueError(f"record {name} has {self.records[name].file_size} bytes")
        return self.archive.read(name)

    def _stored(self, name: str, value: Any) -> StoredTensor:
        if not isinstance(value, _Tensor):
            raise ValueError(f"{name!r} is a {type(value).__name__}, not a tensor")
        encoding, key, length = value.storage
        counts = (length, value.offset, *value.shape)
        if (
            not all(type(n) is int and n >= 0 for n in counts)
            or math.prod(value.shape) + value.offset > length
        ):
            raise ValueError(f"{name!r}: shape {list(value.shape)} in a storage of {length}")
        contiguous = [math.prod(value.shape[i + 1 :]) for i in range(len(value.shape))]
        if list(value.stride) != contiguous:
            raise ValueError(f"{name!r} is not contiguous")
        record = self.records[f"{self.prefix}data/{key}"]
        item = ITEM_SIZES.get(encoding)
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name!r} is compressed")
        if item is None:
            return StoredTensor(self.path, 0, 0, value.shape, encoding)
        if record.file_size != length * item:
            raise ValueError(f"{name!r}: {record.file_size} bytes for {length} of {encoding}")
        offset = self._data_of(record) + value.offset * item
        return StoredTensor(self.path, offset, math.prod(value.shape) * item, value.shape, encoding)

    def _data_of(self, record: zipfile.ZipInfo) -> int:
        """Where in the file the data of a record begins."""
        file = self.archive.fp
        file.seek(record.header_offset)
        signature, name_length, padding = _RECORD.unpack(file.read(_RECORD.size))
        start = record.header_offset + _RECORD.size + name_length + padding
        if signature != b"PK\3\4" or start + record.file_size > self.size:
            raise ValueError(f"record {record.filename} is not where the directory says")
        return start


class _Storage(NamedTuple):
    encoding: str
    key: str
    length: int


class _Tensor(NamedTuple):
    """What a pickle says of a tensor; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    if not (isinstance(storage, _Storage) and type(shape) is type(stride) is tuple):
        raise ValueError("a tensor is not described as one")
    return _Tensor(storage, offset, shape, stride)


# The one in Python: the memo of the one in C is an array, which a single opcode of a hostile file
# can make tens of gigabytes long.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Fresh objects, so that what a pickle sets on one is gone with it.
        match module, name:
            case "torch._utils", "_rebuild_tensor_v2":
                return partial(_tensor)
            case "torch._utils", "_rebuild_parameter":
                return lambda tensor, *_: tensor
            case "collections", "OrderedDict":
                return lambda: OrderedDict()
            case "torch", _ if name.endswith("Storage"):
                return _ENCODINGS.get(name, name)
        raise pickle.UnpicklingError(f"it calls for {module}.{name}, which no tensor needs")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, encoding, key, _, length = pid
        if kind != "storage" or not isinstance(encoding, str):
            raise pickle.UnpicklingError(f"it refers to a {kind!r}")
        return _Storage(encoding, key, length)
