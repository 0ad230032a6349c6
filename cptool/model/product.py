"""A product with weights that a caller may time and complete."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn


class Product(nn.Module):
    """The base of every product of a layer. A subclass computes it in `product`.

    span: opens a context around each product, such as a span of a trace.
    reduce: completes each result in place, such as by a sum over the tensor-parallel ranks that
        hold the other parts of the weights.
    """

    span: Callable[[], AbstractContextManager[None]] | None = None
    reduce: Callable[[torch.Tensor], None] | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.span is None:
            out = self.product(input)
        else:
            with self.span():
                out = self.product(input)
        if self.reduce is not None:
            self.reduce(out)
        return out

    def product(self, input: torch.Tensor) -> torch.Tensor:
        """Return the product of `input` [rows, width], [rows, out], not yet reduced."""
        raise NotImplementedError

    @property
    def observed(self) -> bool:
        """Whether a caller times or completes the product, so that it must run on its own."""
        return self.span is not None or self.reduce is not None
