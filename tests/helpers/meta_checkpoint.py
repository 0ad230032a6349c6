"""Writes Llamas and Chameleons of `transformers` in Meta's layout, divided as its tensor-parallel
ranks were.
"""

import json
import re
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

NAMES = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "model.norm": ("norm", None),
    "lm_head": ("output", 0),
}


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Half-split rotary rows to interleaved ones."""
    return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape).contiguous()


def save_meta(
    model: LlamaForCausalLM, directory: Path, shards: int = 1, embedding_dim: int = 1, **params
) -> Path:
    """`embedding_dim`: 1 as Llama 2 divides its embedding, 0 as Llama 3 does. `params` adds fields
    to params.json or replaces them; a value of `...` removes one.
    """
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    files = [{} for _ in range(shards)]
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name.startswith("lm_head"):
            continue
        if name.startswith("model.vqmodel."):
            continue
        layer, part = "", name.removesuffix(".weight")
        if part.startswith("model.layers."):
            _, _, number, part = part.split(".", 3)
            layer = f"layers.{number}."
        if (norm := re.fullmatch(r"self_attn\.([qk])_norm(\.bias)?", part)) is not None:
            kind = f"{layer}attention.{norm[1]}_normalization.{'bias' if norm[2] else 'weight'}"
            rows = interleave(tensor.reshape(-1, 1), len(tensor)).view(shards, -1, tensor.shape[1])
            assert (rows == rows[:, :1]).all(), "heads of one file share their norm"
            for file, row in zip(files, rows, strict=True):
                file[kind] = row[0].clone()
            continue
        theirs, dim = NAMES.get(part, ("tok_embeddings", embedding_dim))
        if theirs == "attention.wq":
            tensor = interleave(tensor, heads)
        if theirs == "attention.wk":
            tensor = interleave(tensor, kv_heads)
        if theirs in ("attention.wk", "attention.wv") and shards > kv_heads:
            by_head = tensor.view(kv_heads, -1, tensor.shape[1])
            tensor = by_head.repeat_interleave(shards // kv_heads, 0).flatten(0, 1)
        chunks = [tensor] * shards if dim is None else tensor.chunk(shards, dim)
        for file, chunk in zip(files, chunks, strict=True):
            file[f"{layer}{theirs}.weight"] = chunk.clone()
    directory.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files):
        file["rope.freqs"] = torch.ones(config.hidden_size // heads // 2)
        torch.save(file, directory / f"consolidated.{number:02}.pth")
    fields = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "multiple_of": 16,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
        **params,
    }
    kept = {key: value for key, value in fields.items() if value is not ...}
    (directory / "params.json").write_text(json.dumps(kept))
    return directory
