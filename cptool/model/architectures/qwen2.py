"""Qwen 2 and 2.5: a Llama with biases of queries, keys and values."""

from cptool.model.architectures.family import Family
from cptool.model.architectures.llama import WEIGHTS
from cptool.model.architectures.tables import windowed_by_kind, with_biases

_SHAPE = dict(vocab_size=152064, rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=32768)

FAMILY = Family(
    name="qwen2",
    title="Qwen2",
    members="Qwen 2 and 2.5, dense",
    architectures=("Qwen2ForCausalLM",),
    model_type="qwen2",
    gguf="qwen2",
    gguf_interleaved=False,
    defaults={
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    is_windowed=windowed_by_kind(lambda fields, layer: layer >= fields["max_window_layers"]),
    # The biases are there whatever the first two say.
    neutral_fields={"attention_bias": (None, True), "qkv_bias": (None, True)},
    weights=with_biases(WEIGHTS, ".qkv_proj."),
    published={
        "qwen2.5-7b": dict(hidden=3584, layers=28, heads=28, kv_heads=4, ffn=18944, **_SHAPE),
        "qwen2.5-72b": dict(hidden=8192, layers=80, heads=64, kv_heads=8, ffn=29568, **_SHAPE),
    },
)
