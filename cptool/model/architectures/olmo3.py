"""OLMo 3: OLMo 2 with a window in three of four layers, whose rotary embedding is not scaled."""

from cptool.model.architectures.family import Family
from cptool.model.architectures.olmo2 import OLMO_WEIGHTS
from cptool.model.architectures.tables import windowed_by_kind

FAMILY = Family(
    name="olmo3",
    title="OLMo 3",
    members="OLMo 3",
    architectures=("Olmo3ForCausalLM",),
    model_type="olmo3",
    gguf="olmo2",
    gguf_mark="attention.sliding_window",
    gguf_interleaved=False,
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "eos_token_id": 50279,
    },
    default_theta=500000.0,
    window_theta=500000.0,
    flags=("attention_bias",),
    is_windowed=windowed_by_kind(lambda fields, layer: (layer + 1) % 4 != 0),
    float32_norms=True,
    weights=OLMO_WEIGHTS,
)
