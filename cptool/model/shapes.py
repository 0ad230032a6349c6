"""Shapes of models without a checkpoint, for planning, emulating and measuring."""

from typing import Any

from cptool.model.architectures.registry import families
from cptool.model.config import LlamaConfig, RopeScaling


def llama_config(
    *, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, **fields: Any
) -> LlamaConfig:
    """Return the shape of a Llama 2 of these widths; `fields` replace further ones by name."""
    llama2: dict[str, Any] = dict(
        vocab_size=32000,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        **{**llama2, **fields},
    )


def _llama3(factor: float = 8.0, **fields: Any) -> LlamaConfig:
    """Releases 3.1 and 3.2: 131072 positions, and rotary frequencies stretched by `factor`."""
    return llama_config(
        kv_heads=8,
        vocab_size=128256,
        rope_theta=5e5,
        max_position_embeddings=131072,
        rope_scaling=RopeScaling(kind="llama3", factor=factor),
        tie_word_embeddings=factor == 32.0,
        **fields,
    )


def _code_llama(**fields: Any) -> LlamaConfig:
    return llama_config(rope_theta=1e6, max_position_embeddings=16384, **fields)


SHAPES: dict[str, LlamaConfig] = {
    "llama2-7b": llama_config(hidden=4096, layers=32, heads=32, kv_heads=32, ffn=11008),
    "llama2-13b": llama_config(hidden=5120, layers=40, heads=40, kv_heads=40, ffn=13824),
    "llama2-70b": llama_config(hidden=8192, layers=80, heads=64, kv_heads=8, ffn=28672),
    "llama3-1b": _llama3(32.0, hidden=2048, layers=16, heads=32, ffn=8192, head_dim=64),
    "llama3-3b": _llama3(32.0, hidden=3072, layers=28, heads=24, ffn=8192),
    "llama3-8b": _llama3(hidden=4096, layers=32, heads=32, ffn=14336),
    "llama3-70b": _llama3(hidden=8192, layers=80, heads=64, ffn=28672),
    "llama3-405b": _llama3(hidden=16384, layers=126, heads=128, ffn=53248),
    "codellama-7b": _code_llama(
        hidden=4096, layers=32, heads=32, kv_heads=32, ffn=11008, vocab_size=32016
    ),
    "codellama-13b": _code_llama(
        hidden=5120, layers=40, heads=40, kv_heads=40, ffn=13824, vocab_size=32016
    ),
    "codellama-34b": _code_llama(hidden=8192, layers=48, heads=64, kv_heads=8, ffn=22016),
    "codellama-70b": _code_llama(
        hidden=8192, layers=80, heads=64, kv_heads=8, ffn=28672, vocab_size=32016
    ),
    **{
        name: llama_config(family=family.name, **fields)
        for family in families()
        for name, fields in family.published.items()
    },
}
"""Published models by name."""
