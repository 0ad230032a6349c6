"""Chameleon, text out: a Llama with LayerNorms of each head of queries and keys, and in its largest
model with the other norms after the blocks. Images are tokens of the vocabulary.
"""

from cptool.model.architectures.family import Family, Size, Weight
from cptool.model.architectures.llama import WEIGHTS
from cptool.model.architectures.tables import with_optional_biases, with_query_key_norms

_QUERY_KEY_NORMS = tuple(
    Weight(
        parameter=f"layers.{{}}.self_attn.{name}_norm.{part}",
        shape=(size,),
        huggingface=f"model.layers.{{}}.self_attn.{name}_norm.{part}",
        gguf=f"blk.{{}}.attn_{name}_norm.{part}",
        meta=f"layers.{{}}.attention.{name}_normalization.{part}",
        rotated=True,
        by_head=True,
    )
    for name, size in (("q", Size.QUERIES), ("k", Size.KEYS))
    for part in ("weight", "bias")
)

# A message ends with the tokenizer's `sep_token`, as in transformers' processor.
_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('there are no system messages') }}{% endif %}"
    "{{ message['content'] }}<reserved08706>{% endfor %}"
)

FAMILY = Family(
    name="chameleon",
    title="Chameleon",
    members="Chameleon 7B and 30B, text out",
    architectures=("ChameleonForConditionalGeneration",),
    model_type="chameleon",
    gguf="chameleon",
    gguf_interleaved=True,
    defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 32,
        "eos_token_id": 2,
    },
    flags=("attention_bias", "mlp_bias", "swin_norm"),
    used_fields=("vocabulary_map", "vq_config", "model_parallel_size", "image_token_id"),
    image_tokens="IMGIMG",
    image_ends=("<racm3:break>", "<eoss>"),
    chat_template=_CHAT,
    other_tensors="model.vqmodel.",
    weights=with_query_key_norms(with_optional_biases(WEIGHTS), _QUERY_KEY_NORMS),
)
