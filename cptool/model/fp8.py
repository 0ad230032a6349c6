"""A linear layer as a row-wise scaled FP8 product, as the paper's feed-forward layers run."""

import torch
from torch import nn

from cptool.errors import UserError

LARGEST = 448.0
"""Of e4m3."""


def _scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x in e4m3 and the float32 scale [rows, 1] of each row."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn), scale


class RowwiseFp8(nn.Module):
    """x W^T, both in e4m3 with one scale for each row of x and of W; x is scaled as it comes."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.scale = _scaled(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, scale = _scaled(x)
        return torch._scaled_mm(
            rows, self.weight.t(), scale, self.scale.t(), out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """UserError unless the device has row-wise scaled FP8 products of this type of activations."""
    reason = None if dtype == torch.bfloat16 else f"activations are {dtype}, not torch.bfloat16"
    if reason is None:
        try:
            ones = torch.ones(32, 32, dtype=dtype, device=device)
            RowwiseFp8(ones)(ones)
        except (RuntimeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
    if reason:
        raise UserError(f"--fp8: {device} cannot compute it ({reason}); leave it out")
