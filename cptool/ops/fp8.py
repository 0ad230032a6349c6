"""Row-wise scaled FP8: weights in e4m3, and rows that are rounded to e4m3 in each product.

Each row of the weights, and each row that is multiplied with them, has a scale of its own, which
takes its largest value to the largest number of e4m3: the setting of the feed-forward layers in the
paper ("row-wise FP8", FBGEMM's; rows are scaled dynamically). CUDA devices of compute capability
8.9 and later multiply FP8 themselves; elsewhere the same rounded values are multiplied in float32,
which is slow, since weights are widened for every product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cptool.errors import UserError
from cptool.ops.encodings import FP8_SCALE_BYTES
from cptool.ops.stored import StoredWeight

LARGEST = 448.0
"""The largest number of e4m3."""

_E4M3 = torch.float8_e4m3fn

_PIECE = 1 << 22
"""Elements of weights that are widened at a time where there are no FP8 products."""

_FIRST_CAPABILITY = (8, 9)
_MULTIPLE = 16
"""Of rows and depth of weights that a device multiplies."""


def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [rows, depth] in e4m3 and the float32 scale [rows, 1] of each row.

    This takes as few passes over memory as single operations allow. The factor is rounded to x's
    type and the scale is its exact inverse. The product is rounded to x's type before it is rounded
    to e4m3, which costs little: 8 bits before 4. Nothing overflows: e4m3 rounds what is less than
    464 to 448. A factor may be too large for float16, whose rows are widened first.
    """
    if x.dtype == torch.float16:
        x = x.float()
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dim=1, keepdim=True)
    factor = LARGEST / largest.clamp(min=1e-12)
    return (x * factor).to(_E4M3), factor.float().reciprocal()


def packed(matrix: Tensor) -> Tensor:
    """Return the float `matrix` [rows, depth] in e4m3, each row followed by its scale: uint8 [rows,
    depth + 4].
    """
    values, scale = scaled(matrix.float())
    return torch.cat([values.view(torch.uint8), scale.view(torch.uint8)], dim=1)


class Fp8Weight(StoredWeight):
    """A matrix [rows, depth] in e4m3, in the form that `packed` returns.

    dtype: of the rows that are multiplied with it. The fused layer takes none (`few_rows`).
    """

    few_rows = 0

    def __init__(self, data: Tensor, dtype: torch.dtype) -> None:
        depth = data.shape[1] - FP8_SCALE_BYTES
        self.parts, self.dtype, self.shape = (), dtype, torch.Size((data.shape[0], depth))
        self.values = data[:, :depth].view(_E4M3)
        # A copy in any case: that of a single row counts as contiguous wherever it begins.
        scale = data[:, depth:].clone(memory_format=torch.contiguous_format)
        self.scale = scale.view(torch.float32)
        self._own = _multiplies(data.device, dtype) and _fits(self.shape)
        if self._own:
            self.values = self.values.contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix and its scales."""
        return self.values.numel() + self.scale.nbytes

    @property
    def independent_rows(self) -> int:
        """Up to how many rows of a product none changes the bits of another."""
        from cptool.ops.linear import FEW_ROWS

        return FEW_ROWS[torch.float32] if self.values.is_cpu else 1

    def linear(self, x: Tensor) -> Tensor:
        """x W^T, [rows, W's rows], of x [rows, depth] in `dtype`, each row of which is rounded to
        e4m3 first; summed in float32, rounded once.
        """
        if x.dtype != self.dtype or x.shape[1] != self.shape[1]:
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)}; it must be {self.dtype} [rows, {self.shape[1]}]"
            )
        rows, scale = scaled(x)
        if self._own:
            return _product(rows, scale, self.values, self.scale)
        return self._widened_product(rows.float(), scale).to(self.dtype)

    def _widened_product(self, x: Tensor, scale: Tensor) -> Tensor:
        from cptool.ops.linear import linear

        count, depth = self.shape
        out = x.new_empty((x.shape[0], count))
        at_once = max(1, _PIECE // max(1, depth))
        for begin in range(0, count, at_once):
            piece = self.values[begin : begin + at_once].float()
            out[:, begin : begin + at_once] = linear(x, piece)
        return out.mul_(scale).mul_(self.scale.T)

    def widened(self) -> Tensor:
        """Return the whole matrix in float32."""
        return self.values.float() * self.scale

    def gather(self, indices: Tensor) -> Tensor:
        """Return the rows at `indices` int64 [...], of `dtype` [..., depth]."""
        return (self.values[indices].float() * self.scale[indices]).to(self.dtype)


def _product(rows: Tensor, scale: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Return the device's own product, in bfloat16."""
    return torch._scaled_mm(
        rows,
        values.t(),
        scale,
        scales.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the device has products of FP8 with rows of `dtype`."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY


def _fits(shape: Sequence[int]) -> bool:
    """Return whether a device that has products of FP8 multiplies a matrix of this shape."""
    return not any(n % _MULTIPLE for n in shape)


def how_multiplied(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int]] = ()
) -> str:
    """Return how feed-forward layers in FP8 are computed, in words. shapes: of their matrices."""
    part = "feed-forward in FP8,"
    why = f"{device.type} has no FP8 products of {str(dtype).removeprefix('torch.')} here"
    if _multiplies(device, dtype):
        others = [f"{rows} x {depth}" for rows, depth in shapes if not _fits((rows, depth))]
        if not others:
            return f"{part} multiplied as it is"
        named = " and ".join(others)
        part += f" of which {named} is" if len(others) < len(shapes) else ""
        why = f"rows and depth must be multiples of {_MULTIPLE}, not {named}"
    return f"{part} widened for each product, which is slow: {why}"


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError unless the device has row-wise scaled FP8 products of such activations."""
    reason = None if dtype == torch.bfloat16 else f"activations are {dtype}, not torch.bfloat16"
    if reason is None:
        try:
            ones = scaled(torch.ones(32, 32, dtype=dtype, device=device))
            _product(*ones, *ones)
        except (RuntimeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
    if reason:
        raise UserError(f"`fp8`: {device} cannot compute it ({reason}); leave it out")
