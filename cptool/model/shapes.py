"""Shapes of models without a checkpoint, for planning, emulating and measuring."""

from __future__ import annotations

from cptool.model.config import LlamaConfig, RopeScaling

_LLAMA3_1 = RopeScaling(kind="llama3", factor=8.0)
_LLAMA3_2 = RopeScaling(kind="llama3", factor=32.0)


def llama_config(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    *,
    vocab: int = 32000,
    theta: float = 1e4,
    context: int = 4096,
    head_dim: int = 128,
    scaling: RopeScaling | None = None,
    tied: bool = False,
) -> LlamaConfig:
    """The shape of Llama 2, except for what is given; `context` is `max_position_embeddings`."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        rope_scaling=scaling,
    )


_LLAMA3 = {"vocab": 128256, "theta": 5e5, "context": 131072, "scaling": _LLAMA3_1}
_LLAMA3_SMALL = {**_LLAMA3, "scaling": _LLAMA3_2, "tied": True}
_CODE = {"theta": 1e6, "context": 16384}

SHAPES: dict[str, LlamaConfig] = {
    "llama2-7b": llama_config(4096, 32, 32, 32, 11008),
    "llama2-13b": llama_config(5120, 40, 40, 40, 13824),
    "llama2-70b": llama_config(8192, 80, 64, 8, 28672),
    "llama3-1b": llama_config(2048, 16, 32, 8, 8192, head_dim=64, **_LLAMA3_SMALL),
    "llama3-3b": llama_config(3072, 28, 24, 8, 8192, **_LLAMA3_SMALL),
    "llama3-8b": llama_config(4096, 32, 32, 8, 14336, **_LLAMA3),
    "llama3-70b": llama_config(8192, 80, 64, 8, 28672, **_LLAMA3),
    "llama3-405b": llama_config(16384, 126, 128, 8, 53248, **_LLAMA3),
    "codellama-7b": llama_config(4096, 32, 32, 32, 11008, vocab=32016, **_CODE),
    "codellama-13b": llama_config(5120, 40, 40, 40, 13824, vocab=32016, **_CODE),
    "codellama-34b": llama_config(8192, 48, 64, 8, 22016, **_CODE),
    "codellama-70b": llama_config(8192, 80, 64, 8, 28672, vocab=32016, **_CODE),
}
"""Published models. Llama 3 is its releases 3.1 and 3.2: 131072 positions and llama3 scaling."""
