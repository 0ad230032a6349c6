"""Shapes of models without a checkpoint, for planning, emulating and measuring."""

from typing import Any

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


def _qwen(family: str, **fields: Any) -> LlamaConfig:
    return llama_config(family=family, rope_theta=1e6, rms_norm_eps=1e-6, **fields)


def _gemma3(*, layers: int, **fields: Any) -> LlamaConfig:
    return llama_config(
        family="gemma3",
        layers=layers,
        vocab_size=262208,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=RopeScaling(kind="linear", factor=8.0),
        window_rope_theta=1e4,
        windows=tuple(1024 if (layer + 1) % 6 else None for layer in range(layers)),
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        **fields,
    )


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
    "mistral-7b": llama_config(
        hidden=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        ffn=14336,
        family="mistral",
        vocab_size=32768,
        rope_theta=1e6,
        max_position_embeddings=32768,
    ),
    "qwen2.5-7b": _qwen(
        "qwen2",
        hidden=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        ffn=18944,
        vocab_size=152064,
        max_position_embeddings=32768,
    ),
    "qwen2.5-72b": _qwen(
        "qwen2",
        hidden=8192,
        layers=80,
        heads=64,
        kv_heads=8,
        ffn=29568,
        vocab_size=152064,
        max_position_embeddings=32768,
    ),
    "qwen3-8b": _qwen(
        "qwen3",
        hidden=4096,
        layers=36,
        heads=32,
        kv_heads=8,
        ffn=12288,
        vocab_size=151936,
        max_position_embeddings=40960,
    ),
    "qwen3-32b": _qwen(
        "qwen3",
        hidden=5120,
        layers=64,
        heads=64,
        kv_heads=8,
        ffn=25600,
        vocab_size=151936,
        max_position_embeddings=40960,
    ),
    "gemma3-27b": _gemma3(
        hidden=5376, layers=62, heads=32, kv_heads=16, ffn=21504, score_scale=168**-0.5
    ),
}
"""Published models by name."""
