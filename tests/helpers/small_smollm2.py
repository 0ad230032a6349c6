"""A small Llama that reads and writes the tokens of SmolLM2, in its chat template.

Tests of texts and conversations are as strict on it as on the model itself, whose 135 million
weights take a hundred times as long.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from gguf_checkpoint import interleave, write

from cptool.checkpoint.gguf.header import read_header

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

HEADS, KV_HEADS, HEAD_DIM, LAYERS, CONTEXT, FFN, THETA, EPSILON = 4, 2, 16, 2, 8192, 96, 1e5, 1e-5
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WORDS = 600
"""So many tokens, all of them ASCII words, are what it answers with."""


def small_smollm2(smollm2: Path, path: Path) -> LlamaForCausalLM:
    """Write the model to the GGUF file `path`, with the tokenizer of the file `smollm2`; return it
    as `transformers` has it.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    metadata = read_header(smollm2).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        rope_theta=THETA,
        rms_norm_eps=EPSILON,
        tie_word_embeddings=False,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(4)
    model = LlamaForCausalLM(config).eval()
    words = [i for i, token in enumerate(tokens) if re.fullmatch("Ġ[a-z]{3,}", token)][:WORDS]
    others = torch.ones(len(tokens), dtype=torch.bool)
    others[words] = False
    with torch.no_grad():
        model.lm_head.weight[others] = 0
    tensors = {"token_embd": model.model.embed_tokens, "output_norm": model.model.norm}
    tensors["output"] = model.lm_head
    for n, layer in enumerate(model.model.layers):
        tensors |= {f"blk.{n}.{ours}": layer.get_submodule(name) for name, ours in NAMES.items()}
    arrays = {name: module.weight.detach().numpy() for name, module in tensors.items()}
    for name in arrays:
        if name.endswith(("attn_q", "attn_k")):
            arrays[name] = interleave(arrays[name], HEADS if name[-1] == "q" else KV_HEADS)
    shape = {
        "llama.block_count": LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": HEADS * HEAD_DIM,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": EPSILON,
        "llama.rope.freq_base": THETA,
    }
    own = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    write(path, arrays, **shape, **own)
    return model
