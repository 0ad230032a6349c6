"""Options of how an engine computes, set by a command or a caller. Imports no torch."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cptool.ops.encodings import ENCODINGS
from cptool.ops.processor import has_bfloat16_products

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of `cptool.engine.engine.Engine`.

    variant: attention variant, or "auto" to choose one for each forward.
    partials: "float32", or "working" to send partial outputs in the model's dtype
        (`cptool.parallel.step.Step` says what that costs in error).
    static: whether `decode` under the variant "auto" runs over static memory
        (`cptool.engine.static_decode`); None means on CUDA only.
    """

    variant: str = "auto"
    partials: str = "float32"
    static: bool | None = None


def resolve_dtype(requested: str, checkpoint: "Checkpoint", device: str) -> str:
    """Return the dtype to compute in: `requested`, or for "auto" the checkpoint's own if `device`
    is fast in it.

    No processor that cptool knows is fast in float16, and those without bfloat16 products take
    several times as long in bfloat16 as in float32, which loses nothing.
    """
    if requested != "auto":
        return requested
    own = checkpoint.matrix_dtype or "float32"
    if device != "cpu":
        return own
    return own if own == "bfloat16" and has_bfloat16_products() else "float32"


def mean_weight_size(checkpoint: "Checkpoint", dtype: str, device: str) -> float | None:
    """Return the bytes per element of the matrices of a model that computes in `dtype` on `device`;
    None where every weight has that dtype.

    On a CPU, products in float32 read matrices as they are stored (`cptool.ops.stored`).
    """
    if device != "cpu" or dtype != "float32":
        return None
    matrices = [tensor for tensor in checkpoint.stored.values() if len(tensor.shape) == 2]
    count = {tensor: math.prod(tensor.shape) for tensor in matrices}
    kept = [tensor for tensor in matrices if tensor.encoding in ENCODINGS]
    if not kept:
        return None
    widened = sum(4 * count[tensor] for tensor in matrices if tensor.encoding not in ENCODINGS)
    return (sum(tensor.nbytes for tensor in kept) + widened) / sum(count.values())
