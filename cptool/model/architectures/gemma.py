"""Gemma 1: (1 + w) norms, GELU, and an embedding that is multiplied by the root of its width."""

from typing import Any

from cptool.model.architectures.family import Family
from cptool.model.architectures.llama import WEIGHTS
from cptool.model.architectures.tables import with_one_added, with_optional_biases

DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}

FAMILY = Family(
    name="gemma",
    title="Gemma",
    members="Gemma 1, CodeGemma",
    architectures=("GemmaForCausalLM",),
    model_type="gemma",
    gguf="gemma",
    gguf_interleaved=False,
    defaults={**DEFAULTS, "num_key_value_heads": 16},
    # The first releases say "gelu" and mean the approximation.
    neutral_fields={
        "hidden_act": (None, "gelu", "gelu_pytorch_tanh"),
        "hidden_activation": (None, "gelu_pytorch_tanh"),
    },
    flags=("attention_bias",),
    activation="gelu_tanh",
    float32_norms=True,
    embeds_by_root=True,
    weights=with_optional_biases(with_one_added(WEIGHTS)),
)
