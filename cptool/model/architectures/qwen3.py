"""Qwen 3, dense: a Llama with a norm of each head of queries and keys before their rotation."""

from cptool.model.architectures.family import Family
from cptool.model.architectures.llama import WEIGHTS
from cptool.model.architectures.tables import (
    windowed_by_kind,
    with_optional_biases,
    with_query_key_norms,
)

_SHAPE = dict(vocab_size=151936, rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=40960)

FAMILY = Family(
    name="qwen3",
    title="Qwen3",
    members="Qwen 3, dense",
    architectures=("Qwen3ForCausalLM",),
    model_type="qwen3",
    gguf="qwen3",
    gguf_interleaved=False,
    defaults={
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    flags=("attention_bias",),
    is_windowed=windowed_by_kind(lambda fields, layer: layer >= fields["max_window_layers"]),
    neutral_fields={"use_qk_norm": (None, True), "qk_norm": (None, True)},
    weights=with_query_key_norms(with_optional_biases(WEIGHTS)),
    published={
        "qwen3-8b": dict(hidden=4096, layers=36, heads=32, kv_heads=8, ffn=12288, **_SHAPE),
        "qwen3-32b": dict(hidden=5120, layers=64, heads=64, kv_heads=8, ffn=25600, **_SHAPE),
    },
)
