"""One layer of a decoder: attention and a feed-forward network around the residual stream."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from cptool.model.architectures.family import Family
from cptool.model.architectures.registry import find_family
from cptool.model.attention import Attend, Attention
from cptool.model.config import LlamaConfig
from cptool.model.linear import Linear, Shapes, projection
from cptool.model.norms import RMSNorm, norm_of
from cptool.model.rows import row_slices
from cptool.model.shares import layer_shapes
from cptool.ops import fused_layer
from cptool.ops.elementwise import swiglu_

Passed = Callable[[int, int], bool]
"""passed(done, rows) is called as the feed-forward of a layer has passed `done` of its `rows`; it
returns whether to go on. If not, the result is undefined."""


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, shapes: Shapes, device: torch.device | str) -> None:
        super().__init__()
        self.gate_up_proj = projection(shapes, "mlp.gate_up_proj", device)
        self.down_proj = projection(shapes, "mlp.down_proj", device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(swiglu_(gate, up))


class TanhGeluMLP(MLP):
    """GeGLU: down(gelu(gate(x)) * up(x)) with the approximation of GELU by a tanh."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        gate = torch.ops.aten.gelu_(gate, approximate="tanh")  # torch.nn has none in place
        return self.down_proj(gate.mul_(up))


class DecoderLayer(nn.Module):
    """A norm before each block, whose result is added; updates the residual stream in place."""

    def __init__(
        self, config: LlamaConfig, layer: int, tp: int, device: torch.device | str
    ) -> None:
        super().__init__()
        shapes, family = layer_shapes(config, tp), find_family(config.family)
        norm, size = norm_of(family), config.hidden_size
        self.input_layernorm = norm(size, config.rms_norm_eps, device)
        self.self_attn = Attention(config, layer, shapes, device)
        self.post_attention_layernorm = norm(size, config.rms_norm_eps, device)
        self.mlp = mlp_of(family)(shapes, device)
        # What the extension computes in two calls: all products plain, nothing else switched on.
        self._is_llamas = (
            norm is RMSNorm
            and type(self.mlp) is MLP
            and self.self_attn.is_plain
            and all(type(module) is Linear for module in self._products())
        )

    def forward(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend: Attend,
        *,
        passed: Passed | None = None,
    ) -> None:
        if not hidden.shape[0]:
            self.self_attn.without_tokens(hidden, attend)
            return
        if self._fuses() and fused_layer.takes(hidden, *self._weights()):
            self._in_two_calls(hidden, cos, sin, attend)
            return
        attended = self.self_attn(self.input_layernorm(hidden), cos, sin, attend)
        done = 0
        for rows, added in row_slices(hidden, attended):
            rows += self.mlp(self.post_attention_layernorm.after_adding(rows, added))
            done += rows.shape[0]
            if passed is not None and not passed(done, hidden.shape[0]):
                return

    def _in_two_calls(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> None:
        attention, mlp = self.self_attn, self.mlp
        before, after = self.input_layernorm, self.post_attention_layernorm
        q, kv = attention.num_heads, attention.num_kv_heads
        qkv = fused_layer.before_attention(
            hidden,
            norm=before.weight,
            eps=before.eps,
            qkv=attention.qkv_proj.weight,
            cos=cos,
            sin=sin,
            rotated=q + kv,
        )
        attended = attend(attention.layer, *qkv.split((q, kv, kv), dim=1))
        fused_layer.after_attention_(
            hidden,
            attended,
            o=attention.o_proj.weight,
            norm=after.weight,
            eps=after.eps,
            gate_up=mlp.gate_up_proj.weight,
            down=mlp.down_proj.weight,
        )

    def _fuses(self) -> bool:
        """Return whether the layer is a plain Llama's, and no product is timed or completed by a
        caller.
        """
        return self._is_llamas and not any(module.observed for module in self._products())

    def _products(self) -> tuple[Linear, ...]:
        attention, mlp = self.self_attn, self.mlp
        return attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj

    def _weights(self) -> tuple[fused_layer.Weight, ...]:
        return tuple(module.weight for module in self._products())


class NormedLayer(nn.Module):
    """A layer with a norm before a block, after it, or both, as its family's table has them.

    What a block adds to the residual stream is multiplied by the model's `residual_multiplier`.
    """

    def __init__(
        self, config: LlamaConfig, layer: int, tp: int, device: torch.device | str
    ) -> None:
        super().__init__()
        shapes, family = layer_shapes(config, tp), find_family(config.family)

        def norm(name: str) -> RMSNorm | None:
            if f"{name}.weight" not in shapes:
                return None
            return norm_of(family)(config.hidden_size, config.rms_norm_eps, device)

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = Attention(config, layer, shapes, device)
        self.attention_output_norm = norm("attention_output_norm")
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = mlp_of(family)(shapes, device)
        self.mlp_output_norm = norm("mlp_output_norm")
        self.multiplier = config.residual_multiplier

    def forward(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend: Attend,
        *,
        passed: Passed | None = None,
    ) -> None:
        if not hidden.shape[0]:
            self.self_attn.without_tokens(hidden, attend)
            return
        norms = self._norms()
        attended = self.self_attn(_before(norms.attention, hidden), cos, sin, attend)
        done = 0
        for rows, added in row_slices(hidden, attended):
            rows += self._after(norms.after_attention, added)
            found = self.mlp(_before(norms.mlp, rows))
            rows += self._after(norms.after_mlp, found)
            done += rows.shape[0]
            if passed is not None and not passed(done, hidden.shape[0]):
                return

    def _norms(self) -> "_Norms":
        return _Norms(
            self.input_layernorm,
            self.attention_output_norm,
            self.post_attention_layernorm,
            self.mlp_output_norm,
        )

    def _after(self, norm: RMSNorm | None, found: torch.Tensor) -> torch.Tensor:
        if norm is not None:
            found = norm(found)
        return found if self.multiplier == 1 else found * self.multiplier


class SwinLayer(NormedLayer):
    """A layer with its two norms after the blocks, under the names of those before them."""

    def _norms(self) -> "_Norms":
        return _Norms(None, self.input_layernorm, None, self.post_attention_layernorm)


class _Norms(NamedTuple):
    """The norms before and after each block."""

    attention: RMSNorm | None
    after_attention: RMSNorm | None
    mlp: RMSNorm | None
    after_mlp: RMSNorm | None


def _before(norm: RMSNorm | None, hidden: torch.Tensor) -> torch.Tensor:
    return hidden if norm is None else norm(hidden)


def mlp_of(family: Family) -> type[MLP]:
    """Return the feed-forward network that a family has."""
    return TanhGeluMLP if family.activation == "gelu_tanh" else MLP


Layer = DecoderLayer | NormedLayer


def decoder_layer(
    config: LlamaConfig, layer: int, tp: int = 1, device: torch.device | str = "meta"
) -> Layer:
    """Return layer number `layer` of a model, or a rank's share of it, uninitialised."""
    if config.swin_norm:
        return SwinLayer(config, layer, tp, device)
    norms = {name.removesuffix(".weight") for name in layer_shapes(config, tp)} & _NORMS
    plain = config.residual_multiplier == 1 and norms == _NORMS_BEFORE
    return (DecoderLayer if plain else NormedLayer)(config, layer, tp, device)


_NORMS_BEFORE = {"input_layernorm", "post_attention_layernorm"}
_NORMS = {*_NORMS_BEFORE, "attention_output_norm", "mlp_output_norm"}
