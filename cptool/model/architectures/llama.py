"""Llama 1 to 3, and the models that share their architecture."""

from cptool.model.architectures.family import EMBEDDING, HEAD, Family, Size, Weight
from cptool.model.architectures.tables import with_optional_biases

WEIGHTS = (
    Weight(
        parameter=EMBEDDING,
        shape=(Size.VOCABULARY, Size.HIDDEN),
        huggingface="model.embed_tokens.weight",
        gguf="token_embd.weight",
        meta="tok_embeddings.weight",
    ),
    Weight(
        parameter="layers.{}.input_layernorm.weight",
        shape=(Size.HIDDEN,),
        huggingface="model.layers.{}.input_layernorm.weight",
        gguf="blk.{}.attn_norm.weight",
        meta="layers.{}.attention_norm.weight",
    ),
    Weight(
        parameter="layers.{}.self_attn.qkv_proj.weight",
        shape=(Size.QUERIES, Size.HIDDEN),
        huggingface="model.layers.{}.self_attn.q_proj.weight",
        gguf="blk.{}.attn_q.weight",
        meta="layers.{}.attention.wq.weight",
        rotated=True,
    ),
    Weight(
        parameter="layers.{}.self_attn.qkv_proj.weight",
        shape=(Size.KEYS, Size.HIDDEN),
        huggingface="model.layers.{}.self_attn.k_proj.weight",
        gguf="blk.{}.attn_k.weight",
        meta="layers.{}.attention.wk.weight",
        rotated=True,
    ),
    Weight(
        parameter="layers.{}.self_attn.qkv_proj.weight",
        shape=(Size.KEYS, Size.HIDDEN),
        huggingface="model.layers.{}.self_attn.v_proj.weight",
        gguf="blk.{}.attn_v.weight",
        meta="layers.{}.attention.wv.weight",
    ),
    Weight(
        parameter="layers.{}.self_attn.o_proj.weight",
        shape=(Size.HIDDEN, Size.QUERIES),
        huggingface="model.layers.{}.self_attn.o_proj.weight",
        gguf="blk.{}.attn_output.weight",
        meta="layers.{}.attention.wo.weight",
    ),
    Weight(
        parameter="layers.{}.post_attention_layernorm.weight",
        shape=(Size.HIDDEN,),
        huggingface="model.layers.{}.post_attention_layernorm.weight",
        gguf="blk.{}.ffn_norm.weight",
        meta="layers.{}.ffn_norm.weight",
    ),
    Weight(
        parameter="layers.{}.mlp.gate_up_proj.weight",
        shape=(Size.FFN, Size.HIDDEN),
        huggingface="model.layers.{}.mlp.gate_proj.weight",
        gguf="blk.{}.ffn_gate.weight",
        meta="layers.{}.feed_forward.w1.weight",
    ),
    Weight(
        parameter="layers.{}.mlp.gate_up_proj.weight",
        shape=(Size.FFN, Size.HIDDEN),
        huggingface="model.layers.{}.mlp.up_proj.weight",
        gguf="blk.{}.ffn_up.weight",
        meta="layers.{}.feed_forward.w3.weight",
    ),
    Weight(
        parameter="layers.{}.mlp.down_proj.weight",
        shape=(Size.HIDDEN, Size.FFN),
        huggingface="model.layers.{}.mlp.down_proj.weight",
        gguf="blk.{}.ffn_down.weight",
        meta="layers.{}.feed_forward.w2.weight",
    ),
    Weight(
        parameter="norm.weight",
        shape=(Size.HIDDEN,),
        huggingface="model.norm.weight",
        gguf="output_norm.weight",
        meta="norm.weight",
    ),
    Weight(
        parameter=HEAD,
        shape=(Size.VOCABULARY, Size.HIDDEN),
        huggingface="lm_head.weight",
        gguf="output.weight",
        meta="output.weight",
        needed=lambda config: not config.tie_word_embeddings,
    ),
)
"""The parameters of a Llama without biases, with which tables of other families begin."""

FAMILY = Family(
    name="llama",
    title="Llama",
    members="Llama 1 to 3.3, Code Llama, SmolLM 1 and 2, Yi, DeepSeek LLM",
    # The second spelling is that of the first converted checkpoints.
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    model_type="llama",
    gguf="llama",
    gguf_interleaved=True,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "eos_token_id": 2},
    flags=("attention_bias", "mlp_bias"),
    weights=with_optional_biases(WEIGHTS),
)
