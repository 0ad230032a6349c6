"""OLMo 2: norms after the blocks alone, and norms of all heads of queries and of keys."""

from cptool.model.architectures.family import Family, Size, Weight
from cptool.model.architectures.llama import WEIGHTS
from cptool.model.architectures.tables import (
    norm,
    with_norms,
    with_optional_biases,
    with_query_key_norms,
)

_QUERY_KEY_NORMS = tuple(
    Weight(
        parameter=f"layers.{{}}.self_attn.{name}_norm.weight",
        shape=(size,),
        huggingface=f"model.layers.{{}}.self_attn.{name}_norm.weight",
        gguf=f"blk.{{}}.attn_{name}_norm.weight",
    )
    for name, size in (("q", Size.QUERIES), ("k", Size.KEYS))
)
OLMO_WEIGHTS = with_optional_biases(
    with_norms(
        with_query_key_norms(WEIGHTS, _QUERY_KEY_NORMS),
        (
            norm("attention_output_norm", "post_attention_layernorm", "post_attention_norm"),
            norm("mlp_output_norm", "post_feedforward_layernorm", "post_ffw_norm"),
        ),
    )
)

FAMILY = Family(
    name="olmo2",
    title="OLMo 2",
    members="OLMo 2",
    architectures=("Olmo2ForCausalLM",),
    model_type="olmo2",
    gguf="olmo2",
    gguf_interleaved=False,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279},
    flags=("attention_bias",),
    float32_norms=True,
    weights=OLMO_WEIGHTS,
)
