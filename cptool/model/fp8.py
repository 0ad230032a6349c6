"""A linear layer as a row-wise scaled FP8 product, as the paper's feed-forward layers run."""

import torch

from cptool.errors import UserError
from cptool.model.product import Product

LARGEST = 448.0
"""The largest number of e4m3."""


def _scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x in e4m3 and the float32 scale [rows, 1] of each row.

    This takes as few passes over memory as single operations allow. The factor is rounded to x's
    type and the scale is its exact inverse. The product is rounded to x's type before it is rounded
    to e4m3, which costs little: 8 bits before 4. Nothing overflows: e4m3 rounds what is less than
    464 to 448.
    """
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dim=1, keepdim=True)
    factor = LARGEST / largest.clamp(min=1e-12)
    return (x * factor).to(torch.float8_e4m3fn), factor.float().reciprocal()


class RowwiseFp8(Product):
    """x W^T, both in e4m3 with one scale per row of x and of W; x is scaled in each call."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.scale = _scaled(weight)

    def product(self, input: torch.Tensor) -> torch.Tensor:
        rows, scale = _scaled(input)
        return torch._scaled_mm(
            rows,
            self.weight.t(),
            scale,
            self.scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError unless the device has row-wise scaled FP8 products of such activations."""
    reason = None if dtype == torch.bfloat16 else f"activations are {dtype}, not torch.bfloat16"
    if reason is None:
        try:
            ones = torch.ones(32, 32, dtype=dtype, device=device)
            RowwiseFp8(ones)(ones)
        except (RuntimeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
    if reason:
        raise UserError(f"`fp8`: {device} cannot compute it ({reason}); leave it out")
