"""The norms of the families: of rows of the residual stream, and of queries and keys."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from cptool.model.architectures.family import Family
from cptool.ops.elementwise import add_rms_norm_, rms_norm


class RMSNorm(nn.Module):
    """`cptool.ops.elementwise.rms_norm`, the order of operations of `transformers`."""

    def __init__(self, size: int, eps: float, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device=device))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def after_adding(self, hidden: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """Return the norm of hidden + added; the sum replaces `hidden`."""
        return add_rms_norm_(hidden, added, self.weight, self.eps)


class Float32RMSNorm(RMSNorm):
    """An RMS norm that multiplies with its weight in float32 and rounds once, at the end.

    Its weight is float32 in a model of any type, for 1 + w of a bfloat16 w is no bfloat16.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            return rms_norm(x, self.weight, self.eps)
        normed = functional.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return normed.mul_(self.weight).to(x.dtype)

    def after_adding(self, hidden: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        if hidden.dtype == torch.float32:
            return super().after_adding(hidden, added)
        hidden += added
        return self(hidden)


class WidthRMSNorm(Float32RMSNorm):
    """The norm of all heads of queries or keys together, of which a rank may hold a part.

    reduce: adds up, in place, what the ranks hold that have the other heads. Heads that several
        ranks hold count as often in the sum as in the width, so the mean is that of the whole.
    """

    reduce: Callable[[torch.Tensor], None] | None = None

    def __init__(self, size: int, eps: float, device: torch.device | str, ranks: int) -> None:
        super().__init__(size, eps, device)
        self.width = size * ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reduce is None:
            return super().forward(x)
        wide = x.float()
        squares = wide.square().sum(-1, keepdim=True)
        self.reduce(squares)
        normed = wide * torch.rsqrt(squares / self.width + self.eps)
        return normed.mul_(self.weight).to(x.dtype)


class HeadLayerNorm(nn.Module):
    """A LayerNorm of each head on its own, with a weight and a bias for each of its elements.

    Chameleon's; the order of operations is that of `transformers`, whose `eps` is fixed.
    """

    def __init__(self, size: int, head_dim: int, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device=device))
        self.bias = nn.Parameter(torch.empty(size, device=device))
        self.head_dim = head_dim

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """Return the norm of `heads` [T, H, D]."""
        normed = functional.layer_norm(heads, (self.head_dim,), eps=1e-5)
        normed *= self.weight.view(-1, self.head_dim)
        normed += self.bias.view(-1, self.head_dim)
        return normed


def norm_of(family: Family) -> type[RMSNorm]:
    """Return the norm that a family has."""
    return Float32RMSNorm if family.float32_norms else RMSNorm


def normalise_(norm: RMSNorm | HeadLayerNorm, heads: torch.Tensor) -> None:
    """Replace `heads` [T, H, D] by their norm: of each head if it is a LayerNorm or its weight is
    [D], else of all of them together.
    """
    if isinstance(norm, HeadLayerNorm):
        heads.copy_(norm(heads))
        return
    rows = heads.reshape(-1, norm.weight.shape[0])
    heads.copy_(norm(rows).view(heads.shape))
