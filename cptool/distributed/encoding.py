"""Encoding of values that ranks and processes exchange as bytes, and decoding, without pickle.

What another process sends can only become data: None, booleans, numbers, strings, bytes, lists,
tuples, sets, dictionaries, tensors, and the dataclasses that the receiver lists. Nothing is looked
up by a name that the sender chose.

An encoded value is 8 bytes of length, that many bytes of JSON, and the contents of its tensors one
after another. JSON has no tuples, sets, bytes or keys other than strings; these, tensors and
dataclasses are objects with one member, which names the kind.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_LENGTH = struct.Struct("<Q")
_DTYPES = (
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
)


def encode(value: Any, types: Iterable[type] = ()) -> bytes:
    """Return `value` as bytes.

    types: the dataclasses that may occur in it. Raises TypeError for any other type that the
    module's docstring does not list, and ValueError for a tensor of an unsupported dtype.
    """
    buffers: list[bytes] = []
    text = json.dumps(_plain(value, {kind.__name__: kind for kind in types}, buffers)).encode()
    return b"".join((_LENGTH.pack(len(text)), text, *buffers))


def decode(data: bytes | bytearray | memoryview, types: Iterable[type] = ()) -> Any:
    """Return the value that `encode` encoded as `data`; tensors are on the CPU.

    Raises ValueError for bytes that no value encodes to, or that name a dataclass not in `types`.
    """
    data = memoryview(data)
    try:
        (length,) = _LENGTH.unpack_from(data)
        if length > len(data) - _LENGTH.size:
            raise ValueError(f"not an encoded value ({len(data)} bytes, of which {length} are due)")
        reader = _Reader(data[_LENGTH.size + length :], {kind.__name__: kind for kind in types})
        value = reader.value(json.loads(bytes(data[_LENGTH.size : _LENGTH.size + length])))
    except (struct.error, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"not an encoded value ({type(error).__name__}: {error})") from None
    if len(reader.rest):
        raise ValueError(f"not an encoded value ({len(reader.rest)} bytes too many)")
    return value


def _plain(value: Any, types: dict[str, type], buffers: list[bytes]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_plain(item, types, buffers) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(item, types, buffers) for item in value]}
    if isinstance(value, (set, frozenset)):
        return {type(value).__name__: [_plain(item, types, buffers) for item in sorted(value)]}
    if isinstance(value, dict):
        items = value.items()
        return {"dict": [[_plain(part, types, buffers) for part in item] for item in items]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if dataclasses.is_dataclass(value) and types.get(type(value).__name__) is type(value):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return {type(value).__name__: [_plain(field, types, buffers) for field in fields]}

    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"a {type(value).__name__} cannot be sent to another process")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"a tensor of {dtype} cannot be sent to another process")
    # Cloned: a tensor of one element or none may keep strides that rule out a view as bytes.
    flat = value.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)
    buffers.append(flat.view(torch.uint8).numpy().tobytes())
    return {"tensor": [dtype, list(value.shape)]}


class _Reader:
    """Decodes JSON values and takes the tensors' contents from `rest` in order.

    rest: the contents of the tensors that were not read yet.
    """

    def __init__(self, rest: memoryview, types: dict[str, type]) -> None:
        self.rest, self.types = rest, types

    def value(self, plain: Any) -> Any:
        if isinstance(plain, list):
            return list(map(self.value, plain))
        if not isinstance(plain, dict):
            return plain
        ((kind, content),) = plain.items()
        if kind == "bytes":
            return bytes.fromhex(content)
        if kind == "tensor":
            return self._tensor(*content)
        if not isinstance(content, list):
            raise TypeError(f"{kind} without a list")
        items = list(map(self.value, content))
        if kind in ("tuple", "set", "frozenset"):
            return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](items)
        if kind == "dict":
            return dict(items)
        fields = [field.name for field in dataclasses.fields(self.types[kind])]
        return self.types[kind](**dict(zip(fields, items, strict=True)))

    def _tensor(self, dtype: str, shape: list[int]) -> torch.Tensor:
        import torch

        if dtype not in _DTYPES or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"no tensor: {dtype!r} {shape!r}")
        kind = getattr(torch, dtype)
        size = math.prod(shape) * kind.itemsize
        if size > len(self.rest):
            raise ValueError(f"no tensor: {size} bytes, of which {len(self.rest)} are there")
        content, self.rest = self.rest[:size], self.rest[size:]
        flat = torch.empty(size, dtype=torch.uint8)
        if size:
            flat.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        return flat.view(kind).view(shape)
