"""Granite 3: a Llama whose embedding, residual stream, scores and logits are scaled."""

from cptool.model.architectures.family import Family, Number
from cptool.model.architectures.llama import WEIGHTS
from cptool.model.architectures.tables import with_optional_biases

FAMILY = Family(
    name="granite",
    title="Granite",
    members="Granite 3.0 to 3.3, dense",
    architectures=("GraniteForCausalLM",),
    model_type="granite",
    gguf="granite",
    gguf_interleaved=True,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "eos_token_id": 2},
    numbers=(
        Number(
            field="embedding_multiplier",
            huggingface="embedding_multiplier",
            gguf="embedding_scale",
            default=1.0,
        ),
        Number(
            field="residual_multiplier",
            huggingface="residual_multiplier",
            gguf="residual_scale",
            default=1.0,
        ),
        Number(
            field="score_scale",
            huggingface="attention_multiplier",
            gguf="attention.scale",
            default=1.0,
        ),
        Number(
            field="logits_divisor",
            huggingface="logits_scaling",
            gguf="logit_scale",
            default=1.0,
        ),
    ),
    flags=("attention_bias", "mlp_bias"),
    weights=with_optional_biases(WEIGHTS),
)
