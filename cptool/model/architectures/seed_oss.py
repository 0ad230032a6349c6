"""Seed-OSS: a Llama with biases of queries, keys and values, and a name of its own for a norm."""

from dataclasses import replace

from cptool.model.architectures.family import Family
from cptool.model.architectures.llama import WEIGHTS
from cptool.model.architectures.tables import with_biases

_GGUF_NAMES = {"blk.{}.ffn_norm.weight": "blk.{}.post_attention_norm.weight"}
_WEIGHTS = tuple(replace(w, gguf=_GGUF_NAMES.get(w.gguf, w.gguf)) for w in WEIGHTS)

FAMILY = Family(
    name="seed_oss",
    title="Seed-OSS",
    members="Seed-OSS 36B",
    architectures=("SeedOssForCausalLM",),
    model_type="seed_oss",
    gguf="seed_oss",
    gguf_interleaved=False,
    defaults={
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "attention_bias": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    flags=("attention_bias",),
    weights=with_biases(_WEIGHTS, ".qkv_proj.", lambda config: config.attention_bias),
    published={
        "seed-oss-36b": dict(
            hidden=5120,
            layers=64,
            heads=80,
            kv_heads=8,
            ffn=27648,
            vocab_size=155136,
            rms_norm_eps=1e-6,
            rope_theta=1e7,
            max_position_embeddings=524288,
            attention_bias=True,
        )
    },
)
