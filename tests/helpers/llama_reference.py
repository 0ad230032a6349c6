"""`transformers` as the oracle for Llama models: random checkpoints and their float64 logits.

It is imported when it is used: ranks that import a test module need not wait for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from cptool.model.config import LlamaConfig

SMALL = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
LLAMA3_SCALING = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
SHAPES = {
    "mha": {},
    "gqa-9-3": dict(hidden_size=144, num_attention_heads=9, num_key_value_heads=3),
    "mqa-5-1": dict(hidden_size=80, num_attention_heads=5, num_key_value_heads=1),
    "head-dim-80": dict(hidden_size=160, num_attention_heads=2, num_key_value_heads=1),
    "head-dim-free": dict(head_dim=32, num_key_value_heads=2),
    "tied": dict(tie_word_embeddings=True),
    "linear": dict(
        rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0),
    ),
    "llama3": dict(head_dim=64, rope_parameters=LLAMA3_SCALING),
}


def random_llama(
    shape: dict, directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0
) -> LlamaForCausalLM:
    """A Llama of `SMALL` with the changes of `shape` and random weights, saved to `directory`.

    Norm weights vary too, and matrices are wide enough for every layer to move the logits.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **shape}, initializer_range=0.1))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model = model.to(dtype).eval()
    model.save_pretrained(directory)
    return model


def save_llama(directory: Path, seed: int, **config) -> Path:
    """Random weights of a whole configuration of `transformers`, saved to `directory`; no
    tokenizer.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(directory)
    return directory


def logits(model: LlamaForCausalLM, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float64 [T, vocabulary]: the logits of the model's weights when computed in `dtype`.

    `transformers` takes its norms in float32 whatever the type of the model; for a float64
    reference they are taken in float64. Rotary tables stay float32: they are part of the model.
    """
    from transformers.models.llama import modeling_llama

    weights = model.state_dict()
    copy = type(model)(model.config).to(dtype).eval()
    copy.load_state_dict(weights)
    forward = modeling_llama.LlamaRMSNorm.forward
    if dtype == torch.float64:
        modeling_llama.LlamaRMSNorm.forward = _float64_norm
    try:
        with torch.inference_mode():
            return copy(tokens[None]).logits[0].double()
    finally:
        modeling_llama.LlamaRMSNorm.forward = forward


def _float64_norm(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def rms(x: torch.Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()


class ToyAttention:
    """Attention of one sequence over all that it was shown, in the plainest way.

    config: that of a model whose scores have a scale, a cap or windows of their own.
    """

    def __init__(self, config: LlamaConfig | None = None) -> None:
        self.layers: dict[int, list[torch.Tensor]] = {}
        self.config, self.scale = config, None if config is None else config.scale

    def _capped(self, q, keys, values, visible):
        """Attention whose scores are capped, rounded as `transformers` rounds it."""
        group, cap = q.shape[1] // keys.shape[1], self.config.score_cap
        k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (keys, values))
        scores = cap * torch.tanh(q.transpose(0, 1) @ k.transpose(1, 2) * self.scale / cap)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32)
        return (weights.to(q.dtype) @ v).transpose(0, 1)

    def at(self, positions: torch.Tensor):
        """The `attend` callable of a forward at these positions."""

        def attend(layer, q, k, v):
            new = [k, v, positions]
            held = self.layers.get(layer)
            kept = (
                new if held is None else [torch.cat(pair) for pair in zip(held, new, strict=True)]
            )
            self.layers[layer] = [tensor.clone() for tensor in kept]
            keys, values, k_pos = self.layers[layer]
            visible = k_pos[None, :] <= positions[:, None]
            if self.config is not None:
                window = self.config.window(layer)
                if window is not None:
                    visible &= k_pos[None, :] > positions[:, None] - window
                if self.config.score_cap is not None:
                    return self._capped(q, keys, values, visible)
            return torch.nn.functional.scaled_dot_product_attention(
                q.transpose(0, 1)[None],
                keys.transpose(0, 1)[None],
                values.transpose(0, 1)[None],
                attn_mask=visible,
                scale=self.scale,
                enable_gqa=True,
            )[0].transpose(0, 1)

        return attend
