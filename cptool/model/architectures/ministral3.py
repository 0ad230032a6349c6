"""Ministral 3: a Mistral with yarn, whose queries grow with their position."""

from cptool.model.architectures.family import Family
from cptool.model.architectures.llama import WEIGHTS

FAMILY = Family(
    name="ministral3",
    title="Ministral 3",
    members="Ministral 3, and in GGUF Mistral Small 3.1 and later",
    architectures=("Ministral3ForCausalLM",),
    model_type="ministral3",
    gguf="mistral3",
    gguf_interleaved=True,
    defaults={
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    grows_queries=True,
    is_windowed=lambda fields, layer: True,
    refused="files with images beside the text",
    weights=WEIGHTS,
)
