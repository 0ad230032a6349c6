"""Weight-only quantisation: float matrices into blocks that products read as they are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from cptool.ops.encodings import BLOCKS, QUANTISED_AS

_WEIGHTS, _BYTES = BLOCKS[QUANTISED_AS]


def quantised(matrix: Tensor, *, whole_rows: bool = False) -> Tensor:
    """Return the float `matrix` [rows, depth] as blocks of `QUANTISED_AS`, uint8 [rows,
    bytes].

    The weights of a block are q d with q from -127 to 127. The scale d is that of the largest
    weight of the block, max|w| / 127, and the blocks have the bits that the `gguf` package makes.

    whole_rows: one scale for each row, which all of its blocks hold.
    """
    rows = matrix.shape[0]
    blocks = matrix.float().view(rows, -1, _WEIGHTS)
    largest = blocks.abs().amax(-1, keepdim=True)
    if whole_rows:
        largest = largest.amax(1, keepdim=True).expand_as(largest)
    scale = largest / 127
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    scaled = blocks * inverse
    magnitude = scaled.abs()
    floor = magnitude.floor()
    # Halves round away from zero, as C's roundf does; torch's round goes to the even one.
    weights = scaled.sign() * (floor + (2 * (magnitude - floor)).floor())
    found = torch.empty(rows, blocks.shape[1], _BYTES, dtype=torch.uint8)
    found[..., :2] = scale.half().view(torch.uint8)
    found[..., 2:] = weights.to(torch.int8).view(torch.uint8)
    return found.view(rows, -1)
