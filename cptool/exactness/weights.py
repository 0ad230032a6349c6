"""How far products with quantised weights are from those of the checkpoint's own, in float64.

Those in FP8 round the rows too that the weights are multiplied with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cptool.engine.weights import load_model, original
from cptool.ops.stored import StoredWeight
from cptool.quantisation import FP8_FEED_FORWARD

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint

ROWS = 4
"""Random rows that each matrix is multiplied with."""


@dataclass(frozen=True)
class WeightErrors:
    """Root mean square errors of products, relative to the product, of the matrix that errs most.

    of_original: against float64 products with the checkpoint's weights, so it is what quantisation
    costs. of_quantised: against float64 products with the quantised weights, so it is what float32
    sums cost, and in FP8 rounding the rows.
    """

    of_original: float
    of_quantised: float

    def fields(self) -> dict[str, float]:
        """Return the fields for --json."""
        return {
            "error_of_original": self.of_original,
            "error_of_quantised": self.of_quantised,
        }


@torch.inference_mode()
def weight_errors(
    checkpoint: Checkpoint, weights: str, dtype: str = "float32", device: str = "cpu"
) -> WeightErrors:
    """Multiply matrices of the first, the middle and the last layer, and the output matrix, which
    are quantised to `weights`, with normally distributed rows: those in FP8 with rows of `dtype` on
    `device`, others in float32 on a CPU.
    """
    if weights != FP8_FEED_FORWARD:
        dtype, device = "float32", "cpu"
    kind = getattr(torch, dtype)
    model = load_model(checkpoint, kind, device, weights=weights)
    last = model.config.num_hidden_layers - 1
    layers = tuple(f"layers.{n}." for n in sorted({0, last // 2, last}))
    generator = torch.Generator().manual_seed(0)
    originals, sums = [0.0], [0.0]
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, StoredWeight):
            continue
        if name.startswith("layers.") and not name.startswith(layers):
            continue
        x = torch.randn(ROWS, weight.shape[1], generator=generator).to(kind)
        ours, x = weight.linear(x.to(device)).double().cpu(), x.double()
        true = x @ original(checkpoint, f"{name}.weight").double().T
        originals.append(_relative(ours, true))
        sums.append(_relative(ours, x @ weight.widened().double().cpu().T))
    return WeightErrors(max(originals), max(sums))


def _relative(found: torch.Tensor, true: torch.Tensor) -> float:
    return ((found - true).square().mean() / true.square().mean()).sqrt().item()
