"""Mistral: a Llama, in some releases with a window of attention."""

from cptool.model.architectures.family import Family
from cptool.model.architectures.llama import WEIGHTS

FAMILY = Family(
    name="mistral",
    title="Mistral",
    members="Mistral 7B, Nemo, Small, Large, Codestral",
    architectures=("MistralForCausalLM",),
    model_type="mistral",
    gguf=None,  # there it is a Llama
    gguf_interleaved=True,
    defaults={
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "eos_token_id": 2,
    },
    is_windowed=lambda fields, layer: True,
    weights=WEIGHTS,
    published={
        "mistral-7b": dict(
            hidden=4096,
            layers=32,
            heads=32,
            kv_heads=8,
            ffn=14336,
            vocab_size=32768,
            rope_theta=1e6,
            max_position_embeddings=32768,
        )
    },
)
