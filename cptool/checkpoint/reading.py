"""Reading stored tensors into torch, as views of the page cache if the file allows it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cptool.checkpoint.tensors import (
    ITEM_SIZES,
    TORCH_DTYPES,
    AnyTensor,
    JoinedTensor,
    StoredTensor,
)

if TYPE_CHECKING:
    from pathlib import Path

    import torch


def is_mapped(tensor: AnyTensor) -> bool:
    """Return whether reading gives a view of the file in the page cache, which all processes
    share.
    """
    if isinstance(tensor, JoinedTensor) or tensor.interleaved_heads or tensor.added:
        return False
    size = ITEM_SIZES.get(tensor.encoding)
    return size is not None and tensor.offset % size == 0


@dataclass
class TensorReader:
    """Reads tensors, each file mapped once for as long as the reader lives."""

    _mappings: dict[Path, Any] = field(default_factory=dict, repr=False)

    def read(self, tensor: AnyTensor, dim: int, bounds: tuple[int, int]) -> torch.Tensor:
        """Read what is within `bounds` [start, stop) of dimension `dim`.

        Returns the stored dtype, float32 if the tensor is quantised or something is added to it.
        Rows in interleaved rotary order come in half-split order; `bounds` of such rows are whole
        heads, else ValueError.
        """
        start, stop = bounds
        if isinstance(tensor, JoinedTensor):
            values = self._join(tensor, dim, start, stop)
        else:
            values = self._values(tensor).narrow(dim, start, stop - start)
            if tensor.added:
                values = values.float() + tensor.added
        if not tensor.interleaved_heads:
            return values
        # Rows 2j, 2j+1 of a head are one rotary pair in the file; j, j + D/2 are one here.
        head_dim = tensor.shape[0] // tensor.interleaved_heads
        if dim == 0 and (start % head_dim or stop % head_dim):
            raise ValueError(f"rows {start} to {stop} cut a head of {head_dim} rows")
        pairs = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
        return pairs.transpose(1, 2).reshape(values.shape)

    def read_stored(
        self, tensor: AnyTensor, dim: int, bounds: tuple[int, int]
    ) -> torch.Tensor | None:
        """Return the bytes of a matrix that are stored for what `bounds` select, uint8 [rows, bytes
        of a row], as a view of the file; None if that is no such view.
        """
        if isinstance(tensor, JoinedTensor) or len(tensor.shape) != 2:
            return None
        start, stop = bounds
        stored = _bytes_of(self._mapping(tensor.file), tensor).view(tensor.shape[0], -1)
        if dim == 0:
            return stored[start:stop]
        # Bytes per weight are a fraction: a part of a row must begin and end between two blocks.
        columns, width = tensor.shape[1], stored.shape[1]
        block = block_weights(tensor.encoding)
        if start % block or stop % block:
            return None
        return stored[:, start * width // columns : stop * width // columns]

    def release(self) -> None:
        """Forget the mapped files: those of which there is no view leave this process's memory."""
        self._mappings.clear()

    def _join(self, tensor: JoinedTensor, dim: int, start: int, stop: int) -> torch.Tensor:
        import torch

        pieces, before = [], 0
        for part in tensor.parts:
            first, last = start, stop
            if dim == tensor.dim:
                first = max(start - before, 0)
                last = min(stop - before, part.shape[dim])
                before += part.shape[dim]
            if first < last:
                pieces.append(self._values(part).narrow(dim, first, last - first))
        return torch.cat(pieces, tensor.dim) if len(pieces) > 1 else pieces[0]

    def _values(self, tensor: StoredTensor) -> torch.Tensor:
        """Return the whole tensor, a view of the mapped file if it is aligned there."""
        import torch

        mapping: Any = self._mapping(tensor.file)  # torch's types leave this kind of storage out
        if tensor.encoding not in TORCH_DTYPES:
            return _dequantize(_bytes_of(mapping, tensor), tensor)
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[tensor.encoding])
        if tensor.offset % dtype.itemsize:
            values = _bytes_of(mapping, tensor).clone().view(dtype)
        else:
            values = torch.empty(0, dtype=dtype)
            values.set_(mapping, tensor.offset // dtype.itemsize, (math.prod(tensor.shape),), (1,))
        return values.view(tensor.shape)

    def _mapping(self, file: Path) -> Any:
        """Return the file as an untyped storage."""
        import torch

        if file not in self._mappings:
            # shared=False maps privately: pages are the page cache's own until they are written to.
            with file.open("rb") as opened:
                # torch takes UTF-8 only, and the name of a file may be bytes of no encoding.
                name = str(file) if str(file).isprintable() else f"/proc/self/fd/{opened.fileno()}"
                self._mappings[file] = torch.UntypedStorage.from_file(
                    name, shared=False, nbytes=file.stat().st_size
                )
        return self._mappings[file]


def block_weights(encoding: str) -> int:
    """Return how many weights a block of an encoding has; 1 for plain types."""
    if encoding in TORCH_DTYPES:
        return 1
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[encoding]][0]


def _bytes_of(mapping: Any, tensor: StoredTensor) -> torch.Tensor:
    import torch

    values = torch.empty(0, dtype=torch.uint8)
    return values.set_(mapping, tensor.offset, (tensor.nbytes,), (1,))


def _dequantize(stored_bytes: torch.Tensor, tensor: StoredTensor) -> torch.Tensor:
    """Return the float32 values of a tensor in a quantised GGML encoding."""
    import torch
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = stored_bytes.numpy().reshape(math.prod(tensor.shape[:-1]), -1)
    values = dequantize(rows, GGMLQuantizationType[tensor.encoding])
    return torch.from_numpy(values).view(tensor.shape)
