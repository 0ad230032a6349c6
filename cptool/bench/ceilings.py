"""The most that a device can do, measured by torch's own operations: no compiler is needed."""

from __future__ import annotations

import torch

from cptool.bench.timing import stopwatch
from cptool.ops.processor import has_bfloat16_products

_ROWS = {"cpu": 1024, "cuda": 8192}


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """Return the FLOP/s of one large square matrix product.

    On a CPU that does not multiply `dtype` itself it is that of float32, to which values are
    widened: torch's product in their own type is many times slower, and no ceiling.
    """
    rows = _ROWS[device]
    if device == "cpu" and not (dtype == torch.bfloat16 and has_bfloat16_products()):
        dtype = torch.float32
    key = (dtype, device)
    if key not in _operands:
        _operands[key] = [torch.randn(rows, rows, device=device).to(dtype) for _ in range(2)]
    a, b = _operands[key]
    return 2 * rows**3 / stopwatch(lambda: torch.mm(a, b), device)


_operands: dict[tuple[torch.dtype, str], list[torch.Tensor]] = {}


def memory_rate(tensor: torch.Tensor, *, wall: bool = False) -> float:
    """Return the bytes/s of summing a contiguous tensor or of copying it, the higher one.

    wall: of wall time, as in `stopwatch`.
    """
    device = tensor.device.type
    words = tensor.flatten().view(torch.uint8)
    words = words[: words.numel() // 8 * 8].view(torch.float32 if device == "cuda" else torch.int64)
    target = torch.empty_like(words)
    target.copy_(words)
    calls = max(1, min(200, (64 << 20) // max(1, words.nbytes)))
    # A copy reads and writes every byte.
    copied = stopwatch(lambda: [target.copy_(words) for _ in range(calls)], device, wall=wall)
    summed = stopwatch(lambda: [words.sum() for _ in range(calls)], device, wall=wall)
    return calls * words.nbytes * max(2 / copied, 1 / summed)
