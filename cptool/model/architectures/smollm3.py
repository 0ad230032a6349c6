"""SmolLM 3: a Llama without a rotary embedding in every fourth layer."""

from collections.abc import Mapping
from typing import Any

from cptool.model.architectures.family import Family
from cptool.model.architectures.llama import WEIGHTS
from cptool.model.architectures.tables import windowed_by_kind, with_optional_biases


def _is_unrotated(fields: Mapping[str, Any], layer: int) -> bool:
    marks = fields.get("no_rope_layers")
    if marks is None:
        return (layer + 1) % fields.get("no_rope_layer_interval", 4) == 0
    return not marks[layer]


FAMILY = Family(
    name="smollm3",
    title="SmolLM3",
    members="SmolLM 3",
    architectures=("SmolLM3ForCausalLM",),
    model_type="smollm3",
    gguf="smollm3",
    gguf_interleaved=True,
    defaults={
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "eos_token_id": 128001,
    },
    default_theta=2e6,
    flags=("attention_bias", "mlp_bias"),
    used_fields=("no_rope_layers", "no_rope_layer_interval"),
    is_unrotated=_is_unrotated,
    is_windowed=windowed_by_kind(_is_unrotated),
    weights=with_optional_biases(WEIGHTS),
)
