"""Gemma 3, of text: Gemma 2 without caps, with norms of queries and keys, and a window in five of
six layers, whose rotary embedding is another.
"""

from collections.abc import Mapping
from typing import Any

from cptool.model.architectures.family import Family, Number
from cptool.model.architectures.gemma import DEFAULTS
from cptool.model.architectures.gemma2 import (
    GEMMA_WEIGHTS,
    NEUTRAL,
    QUERY_SCALE,
    scale_of_largest,
)
from cptool.model.architectures.tables import (
    windowed_by_kind,
    with_one_added,
    with_optional_biases,
    with_query_key_norms,
)
from cptool.model.config import RopeScaling


def _is_windowed(fields: Mapping[str, Any], layer: int) -> bool:
    return (layer + 1) % fields["sliding_window_pattern"] != 0


FAMILY = Family(
    name="gemma3",
    title="Gemma 3",
    members="Gemma 3 270M and 1B, and larger ones in GGUF",
    architectures=("Gemma3ForCausalLM",),
    model_type="gemma3_text",
    gguf="gemma3",
    gguf_interleaved=False,
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    neutral_fields=NEUTRAL,
    used_fields=("sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"),
    numbers=(
        QUERY_SCALE,
        Number(
            field="logits_cap",
            huggingface="final_logit_softcapping",
            gguf="final_logit_softcapping",
        ),
    ),
    default_theta=1e6,
    window_theta=1e4,
    gguf_scale=scale_of_largest(62),
    flags=("attention_bias",),
    refused="files with images beside the text",
    is_windowed=windowed_by_kind(_is_windowed),
    activation="gelu_tanh",
    float32_norms=True,
    embeds_by_root=True,
    weights=with_optional_biases(with_one_added(with_query_key_norms(GEMMA_WEIGHTS))),
    published={
        "gemma3-27b": dict(
            hidden=5376,
            layers=62,
            heads=32,
            kv_heads=16,
            ffn=21504,
            vocab_size=262208,
            rms_norm_eps=1e-6,
            score_scale=168**-0.5,
            rope_theta=1e6,
            rope_scaling=RopeScaling(kind="linear", factor=8.0),
            window_rope_theta=1e4,
            windows=tuple(1024 if (layer + 1) % 6 else None for layer in range(62)),
            max_position_embeddings=131072,
            tie_word_embeddings=True,
        )
    },
)
