"""Rows that pass together through a step whose intermediates are wider than its result."""

from collections.abc import Iterator

import torch

from cptool.model.row_limits import ROWS_AT_ONCE, ROWS_AT_ONCE_CPU


def row_slices(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the tensors of equally many rows piece by piece, all at once if they are few."""
    rows = tensors[0].shape[0]
    at_once = ROWS_AT_ONCE_CPU if tensors[0].is_cpu else ROWS_AT_ONCE
    if rows <= at_once:
        return zip(*((tensor,) for tensor in tensors), strict=True)
    return zip(*(tensor.tensor_split(-(-rows // at_once)) for tensor in tensors), strict=True)
