"""Phi 3 to 4: a Llama in whose files q, k and v are one matrix, and so are gate and up."""

from cptool.model.architectures.family import Family, Fused
from cptool.model.architectures.llama import WEIGHTS

_LAYER = "model.layers.{}."

FAMILY = Family(
    name="phi3",
    title="Phi-3",
    members="Phi 3, 3.5 and 4, dense, of text",
    architectures=("Phi3ForCausalLM",),
    model_type="phi3",
    gguf="phi3",
    gguf_interleaved=False,
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 32000,
    },
    partial_rotary=True,
    # Phi 4 mini has these; transformers reads neither.
    neutral_fields={"full_attn_mod": (None, 1), "interpolate_factor": (None, 1)},
    rope_aliases={"su": "longrope", "yarn": "longrope"},
    is_windowed=lambda fields, layer: True,
    fused=(
        Fused(
            huggingface=f"{_LAYER}self_attn.qkv_proj.weight",
            gguf="blk.{}.attn_qkv.weight",
            parts=tuple(f"{_LAYER}self_attn.{name}_proj.weight" for name in "qkv"),
        ),
        Fused(
            huggingface=f"{_LAYER}mlp.gate_up_proj.weight",
            gguf="blk.{}.ffn_up.weight",
            parts=(f"{_LAYER}mlp.gate_proj.weight", f"{_LAYER}mlp.up_proj.weight"),
        ),
    ),
    weights=WEIGHTS,
)
