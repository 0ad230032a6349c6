"""Random models of every family, by `transformers`: their tokens, and their weights as GGUF.

Names of tensors in GGUF files and the architectures' fields are those of the `gguf` package;
which architectures have rotated rows interleaved is llama.cpp's.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from meta_checkpoint import save_meta

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig, PreTrainedModel

SMALL = dict(
    vocab_size=97,
    hidden_size=96,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128)
GROWING = dict(
    rope_type="yarn",
    rope_theta=1e4,
    factor=16.0,
    original_max_position_embeddings=8,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.5,
)
GEMMA = dict(
    num_hidden_layers=7,
    num_attention_heads=4,
    head_dim=24,
    sliding_window=512,
    tie_word_embeddings=True,
)
GRANITE = dict(
    embedding_multiplier=6.0,
    residual_multiplier=0.22,
    attention_multiplier=0.3,
    logits_scaling=8.0,
)
VQ = dict(base_channels=32, latent_channels=32, embed_dim=8, num_embeddings=16)
IMAGES = {f"IMGIMG{chr(ord('A') + i)}Z": i for i in (*range(4, 20), 41, 42)} | {"<image>": 96}


def phi3(original: int) -> dict[str, Any]:
    """Fields of a Phi 3 with longrope whose context was `original` before."""
    return dict(
        original_max_position_embeddings=original,
        partial_rotary_factor=0.75,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=1e4,
            partial_rotary_factor=0.75,
            short_factor=[1.0, 1.1, 1.2, 1.3, 1.5, 1.7],
            long_factor=[1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
        ),
    )


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-head-100": ("llama", dict(head_dim=100)),
    "llama-head-4": ("llama", dict(head_dim=4)),
    "llama-head-2": ("llama", dict(head_dim=2)),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True, use_sliding_window=False)),
    "qwen3": ("qwen3", dict(head_dim=24)),
    "qwen3-biases": ("qwen3", dict(attention_bias=True, tie_word_embeddings=True, head_dim=16)),
    "mistral": ("mistral", dict(sliding_window=None)),
    "mistral-yarn": ("mistral", dict(sliding_window=None, rope_parameters=YARN)),
    "granite": ("granite", GRANITE),
    "granite-biases": ("granite", dict(**GRANITE, attention_bias=True)),
    "smollm3": ("smollm3", dict(num_hidden_layers=4, tie_word_embeddings=True)),
    "phi3": ("phi3", dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.75))),
    "phi3-short": ("phi3", phi3(512)),
    "phi3-long": ("phi3", phi3(32)),
    "olmo2": ("olmo2", {}),
    "olmo2-mha": ("olmo2", dict(num_key_value_heads=6, attention_bias=True)),
    "olmo3": ("olmo3", dict(num_hidden_layers=4, sliding_window=512)),
    "olmo3-yarn": (
        "olmo3",
        dict(
            num_hidden_layers=4,
            sliding_window=512,
            rope_parameters=dict(
                full_attention=YARN,
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
            ),
        ),
    ),
    "seed-oss": ("seed_oss", dict(head_dim=24)),
    "seed-oss-no-biases": ("seed_oss", dict(head_dim=16, attention_bias=False)),
    "gemma": ("gemma", dict(head_dim=24, tie_word_embeddings=True)),
    "gemma2": (
        "gemma2",
        dict(**GEMMA, attn_logit_softcapping=None, query_pre_attn_scalar=24),
    ),
    "gemma2-caps": ("gemma2", dict(**GEMMA | dict(sliding_window=9), query_pre_attn_scalar=24)),
    "gemma3-window": ("gemma3_text", dict(**GEMMA | dict(sliding_window=7))),
    "olmo3-window": ("olmo3", dict(num_hidden_layers=4, sliding_window=13)),
    "mistral-window": ("mistral", dict(sliding_window=16)),
    "qwen2-window": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=11, max_window_layers=1),
    ),
    "phi3-window": ("phi3", dict(sliding_window=20)),
    "gemma2-scale": (
        "gemma2",
        dict(**GEMMA, attn_logit_softcapping=None, query_pre_attn_scalar=100),
    ),
    "gemma3": ("gemma3_text", dict(**GEMMA, query_pre_attn_scalar=24)),
    "gemma3-linear": (
        "gemma3_text",
        dict(
            **GEMMA,
            query_pre_attn_scalar=24,
            final_logit_softcapping=20.0,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                sliding_attention=dict(rope_type="default", rope_theta=5e3),
            ),
        ),
    ),
    "chameleon": ("chameleon", dict(num_key_value_heads=6, vocabulary_map=IMAGES, vq_config=VQ)),
    "chameleon-swin": (
        "chameleon",
        dict(
            vocab_size=98,
            swin_norm=True,
            vocabulary_map=IMAGES,
            vq_config=VQ,
        ),
    ),
    "ministral3": ("ministral3", dict(head_dim=24, rope_parameters=GROWING)),
    "ministral3-window": (
        "ministral3",
        dict(head_dim=16, sliding_window=19, rope_parameters=GROWING | dict(mscale=0.707)),
    ),
    "llama-dynamic": (
        "llama",
        dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)),
    ),
}
"""By name: the `model_type`, and what is not as in `SMALL`."""

META_FILES = {"llama": 1, "chameleon": 1, "chameleon-swin": 2}
"""Cases that are written in Meta's layout, and into how many files."""

NO_GGUF = {
    "ministral3-window",
    *("gemma2-scale", "gemma3-window", "mistral-window", "qwen2-window"),
}
"""Cases that GGUF files of their family do not have."""

GGUF_NAMES = {
    "mistral": "llama",
    "gemma3_text": "gemma3",
    "olmo3": "olmo2",
    "ministral3": "mistral3",
}
INTERLEAVED = {"llama", "mistral3", "granite", "smollm3", "chameleon"}


def random_model(case: str, directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a case with random weights, saved to `directory`.

    Norm weights and biases vary too, and matrices are wide enough for every layer to move the
    logits.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    kind, changes = CASES[case]
    torch.manual_seed(0)
    fields = {**SMALL, **changes, "initializer_range": 0.1, "pad_token_id": None}
    config = AutoConfig.for_model(kind, **fields)
    auto = AutoModelForImageTextToText if kind == "chameleon" else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
            parameter.data += 0 if kind.startswith("gemma") else 1
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        if kind == "chameleon" and re.search(r"\.[qk]_norm\.", name):  # those of a file's heads
            by_file = parameter.data.view(META_FILES[case], -1, parameter.shape[-1])
            by_file.copy_(by_file[:, :1].clone())
    model = model.to(dtype).eval()
    model.save_pretrained(directory)
    return model


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int], steps: int) -> list[int]:
    """The tokens after `prompt`, each from a forward over all tokens before it."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def write_meta(case: str, model: PreTrainedModel, directory: Path) -> None:
    """The same model in Meta's layout, with as many files as `META_FILES` says."""
    params: dict[str, Any] = {}
    if model.config.model_type == "chameleon":
        params = {"qk_normalization": True, "swin_norm": model.config.swin_norm}
    save_meta(model, directory, META_FILES[case], **params)
    if params:
        named = {"<s>": 1, "</s>": 2, "<reserved08706>": 22}
        tokenizer = {"model": {"vocab": {**IMAGES, **named}}}
        (directory / "text_tokenizer.json").write_text(json.dumps(tokenizer))


def add_shape(writer: GGUFWriter, config: Any) -> None:
    """Add what every model's metadata has of its shape."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def write_gguf(model: PreTrainedModel, path: Path, every: int = 0) -> None:
    """The same model as a GGUF file in float32, or as several of `every` tensors each, after one of
    metadata alone.
    """
    import gguf

    config = model.config
    kind = GGUF_NAMES.get(config.model_type, config.model_type)
    names = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    mapped = gguf.get_tensor_name_map(names[kind], config.num_hidden_layers)
    writer = gguf.GGUFWriter(str(path), kind, split_max_tensors=every, small_first_shard=every > 0)
    add_shape(writer, config)
    _write_rope(writer, config)
    if config.model_type == "olmo3":
        kinds = [kind == "sliding_attention" for kind in config.layer_types]
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(kinds)
    if kind in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
        writer.add_final_logit_softcapping(config.final_logit_softcapping or 0.0)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping or 0.0)
    if kind == "chameleon":
        names_of = {token: name for name, token in IMAGES.items()}
        writer.add_swin_norm(config.swin_norm)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("chameleon")
        writer.add_token_list([names_of.get(i, f"<{i}>") for i in range(config.vocab_size)])
    if kind == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if getattr(config, "head_dim", None) is not None:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.startswith("model.vqmodel."):
            continue
        values = tensor.float().numpy()
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if kind in INTERLEAVED and ".q_proj." in name:
            values = interleaved(values, config.num_attention_heads)
        if kind in INTERLEAVED and ".k_proj." in name:
            values = interleaved(values, config.num_key_value_heads)
        if kind == "chameleon" and re.search(r"\.[qk]_norm\.", name):
            values = interleaved(values.reshape(-1), len(values)).reshape(values.shape)
        writer.add_tensor(mapped.get_name(name, try_suffixes=(".weight", ".bias")), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_rope(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    """The rotary embedding as llama.cpp's converters write it."""
    import gguf

    rope = config.rope_parameters
    if config.model_type == "gemma3_text":
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    if config.model_type == "olmo3":
        assert rope["sliding_attention"]["rope_theta"] == rope["full_attention"]["rope_theta"]
        rope = rope["full_attention"]
    kind = rope["rope_type"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("yarn", "linear"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
        if config.model_type == "olmo3":
            writer.add_rope_scaling_attn_factors(0.1 * math.log(rope["factor"]) + 1)
    if (original := rope.get("original_max_position_embeddings")) is not None:
        writer.add_rope_scaling_orig_ctx_len(original)
    if config.model_type == "phi3":
        part = rope.get("partial_rotary_factor", 1.0)
        writer.add_rope_dimension_count(
            int(part * config.hidden_size // config.num_attention_heads)
        )
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "ministral3":
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    if kind == "longrope":
        grown = config.max_position_embeddings / original
        factor = math.sqrt(1 + math.log(grown) / math.log(original)) if grown > 1 else 1.0
        writer.add_rope_scaling_attn_factors(factor)
        for length in ("short", "long"):
            factors = np.array(rope[f"{length}_factor"], dtype=np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Half-split rotary rows to interleaved ones, as converters to GGUF do."""
    pairs = rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(pairs.reshape(rows.shape))
