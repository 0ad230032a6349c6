"""Gemma 2: norms before and after both blocks, capped scores and logits, a window in every other
layer.
"""

from collections.abc import Callable

from cptool.model.architectures.family import Family, Number
from cptool.model.architectures.gemma import DEFAULTS
from cptool.model.architectures.llama import WEIGHTS
from cptool.model.architectures.tables import (
    norm,
    windowed_by_kind,
    with_norms,
    with_one_added,
    with_optional_biases,
)
from cptool.model.config import LlamaConfig

NEUTRAL = {
    "hidden_act": (None, "silu", "gelu", "gelu_pytorch_tanh"),  # transformers looks at the next one
    "hidden_activation": (None, "gelu_pytorch_tanh"),
}
GEMMA_WEIGHTS = with_norms(
    WEIGHTS,
    (
        norm("input_layernorm", "input_layernorm", "attn_norm"),
        norm("attention_output_norm", "post_attention_layernorm", "post_attention_norm"),
        norm("post_attention_layernorm", "pre_feedforward_layernorm", "ffn_norm"),
        norm("mlp_output_norm", "post_feedforward_layernorm", "post_ffw_norm"),
    ),
)
QUERY_SCALE = Number(
    field="score_scale",
    huggingface="query_pre_attn_scalar",
    gguf=None,
    default=256,
    convert=lambda scalar: scalar**-0.5,
)


def scale_of_largest(layers: int) -> Callable[[LlamaConfig], float | None]:
    """Return the `gguf_scale` of a family whose largest model, of `layers` layers, scales scores
    otherwise than by its head size.
    """

    def scale(config: LlamaConfig) -> float | None:
        if config.num_hidden_layers != layers:
            return None
        return (config.hidden_size // config.num_attention_heads) ** -0.5

    return scale


FAMILY = Family(
    name="gemma2",
    title="Gemma 2",
    members="Gemma 2",
    architectures=("Gemma2ForCausalLM",),
    model_type="gemma2",
    gguf="gemma2",
    gguf_interleaved=False,
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    # The 9B states its window a second time.
    neutral_fields={**NEUTRAL, "sliding_window_size": (None, 4096)},
    numbers=(
        QUERY_SCALE,
        Number(
            field="score_cap",
            huggingface="attn_logit_softcapping",
            gguf="attn_logit_softcapping",
            gguf_default=50.0,
        ),
        Number(
            field="logits_cap",
            huggingface="final_logit_softcapping",
            gguf="final_logit_softcapping",
            gguf_default=30.0,
        ),
    ),
    gguf_scale=scale_of_largest(46),
    gguf_window=4096,
    flags=("attention_bias",),
    is_windowed=windowed_by_kind(lambda fields, layer: layer % 2 == 0),
    activation="gelu_tanh",
    float32_norms=True,
    embeds_by_root=True,
    weights=with_optional_biases(with_one_added(GEMMA_WEIGHTS)),
)
