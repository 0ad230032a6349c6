"""The products of a model and its embedding."""

import torch
from torch import nn
from torch.nn import functional

from cptool.model.product import Product
from cptool.ops.linear import linear
from cptool.ops.stored import StoredWeight

Shapes = dict[str, tuple[int, ...]]
"""Shape of every parameter of a layer, by its name within the layer."""


class Linear(Product, nn.Linear):
    """A product with a weight matrix, without bias."""

    def __init__(self, width: int, out: int, device: torch.device | str) -> None:
        super().__init__(width, out, bias=False, device=device)

    def product(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight)


class BiasedLinear(Linear):
    """A product with a weight matrix, plus a bias, which is added to what `reduce` has summed."""

    def __init__(self, width: int, out: int, device: torch.device | str) -> None:
        super().__init__(width, out, device)
        self.bias = nn.Parameter(torch.empty(out, device=device))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).add_(self.bias)


def projection(shapes: Shapes, name: str, device: torch.device | str) -> Linear:
    """Return the linear layer `name` of a decoder layer, with a bias if the family has one."""
    out, width = shapes[f"{name}.weight"]
    kind = BiasedLinear if f"{name}.bias" in shapes else Linear
    return kind(width, out, device)


class Embedding(nn.Module):
    """A row of the weights for each token."""

    def __init__(self, tokens: int, width: int, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, width, device=device))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor | StoredWeight = self.weight
        if isinstance(weight, StoredWeight):
            return weight.gather(tokens)
        return functional.embedding(tokens, weight)
