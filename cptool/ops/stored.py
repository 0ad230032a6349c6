"""Weights that stay in the type in which a file stores them, on a CPU.

A quantised weight counts as the float32 value that its type defines, the one of the `gguf` package
bit for bit; bfloat16 and float16 are widened. Activations stay as they are: those in bfloat16 and
float16 are widened too, and results are rounded to their type once. Few rows are multiplied with
weights that are widened in registers (with AVX-512, in the first level of the cache for more than
eight rows), or, with AVX2, with the integers of a block, whose sums are then scaled; all are the
product with the widened weights to the rounding of float32 sums. For many rows a panel of the
weights is widened, once for all of them, and multiplied as any float32 matrix is; with AVX2,
AVX-512 and AMX by kernels that pack it as they widen.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cptool.ops.encodings import BLOCKS, ENCODINGS
from cptool.ops.kernels import EXTENSION as _C
from cptool.ops.kernels import cpu_product_isa

_PANEL_BYTES = 4 << 20
"""Of widened weights. They are written once and read once per block of rows, from a cache."""

_local = threading.local()


@dataclass(frozen=True)
class Blocks:
    """Rows of a matrix as a file stores them.

    data: uint8 [rows, bytes of a row], rows contiguous.
    encoding: a GGML type name of `ENCODINGS`.
    head_dim: 0, or the rows are those of heads in interleaved rotary order; then the matrix has
        them in half-split order.
    """

    data: Tensor
    encoding: str
    head_dim: int = 0

    def __post_init__(self) -> None:
        weights, size = BLOCKS[self.encoding]
        rows, width = self.data.shape
        if self.data.dtype != torch.uint8 or self.data.stride(1) != 1 or width % size:
            raise ValueError(
                f"data is {self.data.dtype} {list(self.data.shape)}; it must be uint8, each row "
                f"whole blocks of {size} bytes ({weights} weights of {self.encoding})"
            )
        if self.head_dim and (self.head_dim % 2 or rows % self.head_dim):
            raise ValueError(f"{rows} rows; they must be whole heads of {self.head_dim} rows")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and depth of the matrix."""
        weights, size = BLOCKS[self.encoding]
        return self.data.shape[0], self.data.shape[1] // size * weights

    @property
    def place(self) -> tuple[int, int, int, int, int, int]:
        """The arguments that tell the extension of a matrix."""
        rows, depth = self.shape
        at, stride = self.data.data_ptr(), self.data.stride(0)
        return at, stride, rows, depth, self.head_dim, ENCODINGS[self.encoding]


class StoredWeight:
    """A matrix [rows, depth] whose `parts` lie one below the other, each in its own type.

    dtype: of the rows that are multiplied with it and gathered from it.
    places: int64 [parts, 6], what the extension is told of each (`Blocks.place`).
    """

    def __init__(self, parts: Sequence[Blocks], dtype: torch.dtype = torch.float32) -> None:
        self.parts, self.dtype = tuple(parts), dtype
        depths = {part.shape[1] for part in self.parts}
        if len(depths) != 1:
            raise ValueError(f"parts of depths {sorted(depths)}; they must have the same")
        self.shape = torch.Size((sum(part.shape[0] for part in self.parts), *depths))
        with torch.inference_mode(False):
            self.places = torch.tensor([part.place for part in self.parts], dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(part.data.numel() for part in self.parts)

    @property
    def few_rows(self) -> int:
        """Up to how many rows all parts are widened in registers."""
        return min(few_rows(part) for part in self.parts)

    @property
    def independent_rows(self) -> int:
        """Up to how many rows of a product none changes the bits of another."""
        return FEW_ROWS

    def linear(self, x: Tensor) -> Tensor:
        """x W^T, [rows, W's rows], of x [rows, depth], both of `dtype`; summed in float32, rounded
        once.

        A row's result for up to FEW_ROWS rows does not depend on the other rows, their number or
        the number of threads.
        """
        rows, depth = x.shape
        if x.dtype != self.dtype or depth != self.shape[1]:
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)}; it must be {self.dtype} [rows, {self.shape[1]}]"
            )
        out = torch.empty((rows, self.shape[0]), dtype=torch.float32)
        if depth == 0:
            return out.zero_().to(self.dtype)
        x = x.float()
        if x.stride(1) != 1:
            x = x.contiguous()
        column = 0
        for part in self.parts:
            _multiply(x, part, out[:, column : column + part.shape[0]])
            column += part.shape[0]
        return out.to(self.dtype)

    def gather(self, indices: Tensor) -> Tensor:
        """Return the rows at `indices` int64 [...], of `dtype` [..., depth].

        Raises IndexError for one that the matrix does not have.
        """
        (part,) = self.parts
        if indices.dtype != torch.int64:
            raise ValueError(f"indices are {indices.dtype}; they must be int64")
        flat = indices.reshape(-1).contiguous()
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < self.shape[0]:
            raise IndexError(f"indices must be from 0 to {self.shape[0] - 1}")
        out = torch.empty((flat.numel(), self.shape[1]), dtype=torch.float32)
        threads = torch.get_num_threads()
        _C.widen_cpu(*part.place, flat.data_ptr(), 0, flat.numel(), out.data_ptr(), threads)
        return out.view(*indices.shape, self.shape[1]).to(self.dtype)

    def widened(self) -> Tensor:
        """Return the whole matrix in float32."""
        out = torch.empty(self.shape, dtype=torch.float32)
        row = 0
        for part in self.parts:
            widen(part, 0, out[row : row + part.shape[0]])
            row += part.shape[0]
        return out


FEW_ROWS = 16
"""The most rows that `few_rows` returns, and the most that are widened a panel at a time where
there is a kernel for many rows.
"""


def few_rows(part: Blocks) -> int:
    """Return up to how many rows its weights are widened in registers."""
    return _C.cpu_stored_rows(ENCODINGS[part.encoding])


def product_arguments(
    x: Tensor, place: tuple[int, int, int, int, int, int], out: Tensor
) -> tuple[int, ...]:
    """Return the arguments of the extension's products that write x W^T to `out`, float32 [rows,
    columns] with contiguous rows. place: that of W (`Blocks.place`).
    """
    threads = torch.get_num_threads()
    rows = (x.data_ptr(), x.stride(0), x.shape[0], out.data_ptr(), out.stride(0))
    return (*place, *rows, threads)


def _multiply(x: Tensor, part: Blocks, out: Tensor) -> None:
    if len(x) <= few_rows(part):
        _C.stored_linear_cpu(*product_arguments(x, part.place, out))
    elif len(x) > FEW_ROWS and cpu_product_isa():
        _C.product_cpu(*product_arguments(x, part.place, out))
    else:
        _multiply_panels(x, part, out)


def _multiply_panels(x: Tensor, part: Blocks, out: Tensor) -> None:
    from cptool.ops.linear import linear

    rows, depth = part.shape
    at_once = max(16, _PANEL_BYTES // (4 * depth) // 16 * 16)
    panel = _panel(min(at_once, rows) * depth).view(-1, depth)
    for begin in range(0, rows, at_once):
        widened = panel[: min(at_once, rows - begin)]
        widen(part, begin, widened)
        out[:, begin : begin + len(widened)] = linear(x, widened)


def widen(part: Blocks, begin: int, out: Tensor) -> None:
    """Write the rows from `begin` on to `out`, float32 and contiguous."""
    _C.widen_cpu(*part.place, 0, begin, len(out), out.data_ptr(), torch.get_num_threads())


def _panel(count: int) -> Tensor:
    """Return float32 scratch memory of this thread."""
    held: Tensor | None = getattr(_local, "panel", None)
    if held is None or held.numel() < count:
        # Not an inference tensor: it is written to in and out of inference mode.
        with torch.inference_mode(False):
            held = _local.panel = torch.empty(count, dtype=torch.float32)
    return held[:count]
