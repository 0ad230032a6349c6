"""Grouped-query attention of one layer, but for the mixing of tokens itself."""

from collections.abc import Callable

import torch
from torch import nn

from cptool.model.architectures.family import LAYER, Size
from cptool.model.architectures.registry import find_family
from cptool.model.config import LlamaConfig
from cptool.model.linear import Shapes, projection
from cptool.model.norms import HeadLayerNorm, RMSNorm, WidthRMSNorm, norm_of, normalise_
from cptool.model.rows import row_slices
from cptool.ops.elementwise import rotate_

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""attend(layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]) -> [T, Hq, D] in the type of q.

q and k are rotated already. All three are strided views of one projection, and stay valid only
until the call returns. Scores are scaled by `config.scale`.
"""


class Attention(nn.Module):
    """Grouped-query attention: query head i reads key-value head i // (Hq / Hkv).

    is_plain: whether all of every query and key is rotated, and nothing else is done to it.
    """

    def __init__(
        self, config: LlamaConfig, layer: int, shapes: Shapes, device: torch.device | str
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = head_dim = config.head_dim
        self.qkv_proj = projection(shapes, "self_attn.qkv_proj", device)
        self.o_proj = projection(shapes, "self_attn.o_proj", device)
        self.num_heads = self.o_proj.in_features // head_dim
        self.num_kv_heads = (self.qkv_proj.out_features // head_dim - self.num_heads) // 2

        def norm(name: str) -> RMSNorm | HeadLayerNorm | None:
            if f"self_attn.{name}.weight" not in shapes:
                return None
            family, (size,) = find_family(config.family), shapes[f"self_attn.{name}.weight"]
            if f"self_attn.{name}.bias" in shapes:
                return HeadLayerNorm(size, head_dim, device)
            if family.weight(f"{LAYER}self_attn.{name}.weight").shape == (Size.HEAD,):
                return norm_of(family)(size, config.rms_norm_eps, device)
            ranks = config.num_attention_heads // self.num_heads
            return WidthRMSNorm(size, config.rms_norm_eps, device, ranks)

        self.q_norm, self.k_norm = norm("q_norm"), norm("k_norm")
        self.rotary_dim = config.rotary_dim or head_dim
        if layer in config.unrotated_layers:
            self.rotary_dim = 0
        self.is_plain = self.q_norm is None and self.rotary_dim == head_dim

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        sizes = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        qkv = self.qkv_proj(x).view(x.shape[0], sum(sizes), self.head_dim)
        q, k, v = qkv.split(sizes, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            for q_rows, k_rows in row_slices(q, k):
                normalise_(self.q_norm, q_rows)
                normalise_(self.k_norm, k_rows)
        if self.rotary_dim:
            rotated = qkv[:, : self.num_heads + self.num_kv_heads, : self.rotary_dim]
            for rows in row_slices(rotated, cos, sin):
                rotate_(*rows)
        return self.o_proj(attend(self.layer, q, k, v).flatten(1))

    def without_tokens(self, x: torch.Tensor, attend: Attend) -> None:
        """Take part in the attention of other ranks although `x` [0, hidden] has no row."""
        q, k, v = (
            x.new_empty(0, heads, self.head_dim)
            for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        )
        attend(self.layer, q, k, v)
