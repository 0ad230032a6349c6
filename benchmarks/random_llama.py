"""Random-weight Llamas in bfloat16 as a Hugging Face directory and, for llama.cpp, as GGUF."""

from __future__ import annotations

from pathlib import Path

import torch
from random_gguf import describe
from transformers import LlamaConfig, LlamaForCausalLM

from cptool.checkpoint.huggingface.config import read_shape

SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


def write(directory: Path, layers: int = 8, gguf: bool = False) -> int:
    """Writes `directory` (and `directory`/model.gguf) and returns the number of parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**SHAPE, "num_hidden_layers": layers},
        max_position_embeddings=1 << 17,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    if gguf:
        _write_gguf(model, directory / "model.gguf")
    return sum(parameter.numel() for parameter in model.parameters())


def _write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    import gguf

    writer = describe(path, read_shape(path.with_name("config.json"), []))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    config = model.config
    state = model.state_dict()
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for layer in range(config.num_hidden_layers):
        for theirs, ours in parts.items():
            names[f"model.layers.{layer}.{theirs}"] = f"blk.{layer}.{ours}"
    for theirs, ours in names.items():
        tensor = state[f"{theirs}.weight"]
        if theirs.endswith(("q_proj", "k_proj")):  # from half-split to interleaved pairs
            heads = tensor.shape[0] // config.head_dim
            shape = (heads, 2, config.head_dim // 2, tensor.shape[1])
            tensor = tensor.view(shape).transpose(1, 2).reshape(tensor.shape)
        if tensor.dim() == 1:
            writer.add_tensor(f"{ours}.weight", tensor.float().numpy())
        else:
            writer.add_tensor(
                f"{ours}.weight",
                tensor.contiguous().view(torch.uint8).numpy(),
                raw_dtype=gguf.GGMLQuantizationType.BF16,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
