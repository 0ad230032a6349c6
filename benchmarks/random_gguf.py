"""GGUF files of any Llama's shape with random weights in a quantised type.

They are written tensor by tensor. Blocks are random bytes under scales that give weights a standard
deviation near 0.02, so that no time depends on the values: none is infinite or subnormal.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from cptool.model.config import LlamaConfig

MIXES = ("bf16", "q4_0", "q8_0", "q4_k_m")
"""Types of whole files. q4_k_m is llama.cpp's: Q4_K, and Q6_K for some of `attn_v` and `ffn_down`
and for the output."""

DEVIATION = 0.02


def write(path: Path, config: LlamaConfig, mix: str) -> None:
    """Write a file of that shape; `mix` is one of `MIXES`. Rotary scaling is left out."""
    generator = np.random.default_rng(0)
    writer = describe(path, config)
    tensors = [
        (f"{name}.weight", shape, _type(name, len(shape), mix, config))
        for name, shape in _shapes(config).items()
    ]
    for name, shape, kind in tensors:
        stored = _bytes_of_rows(shape, kind)
        size = int(np.prod(stored))
        if kind is Type.F32:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
        else:
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, kind in tensors:
        if kind is Type.F32:
            writer.write_tensor_data(np.ones(shape, np.float32))
        else:
            writer.write_tensor_data(_RANDOM[kind](generator, _bytes_of_rows(shape, kind)))
    writer.close()


def describe(path: Path, config: LlamaConfig) -> gguf.GGUFWriter:
    """Return a writer that holds all metadata, with one made-up word per token."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>".encode() for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([3, 3, 3] + [1] * (config.vocab_size - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return writer


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries, keys = (
        config.head_dim * heads
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        for name, shape in {
            "attn_norm": (hidden,),
            "attn_q": (queries, hidden),
            "attn_k": (keys, hidden),
            "attn_v": (keys, hidden),
            "attn_output": (hidden, queries),
            "ffn_norm": (hidden,),
            "ffn_gate": (ffn, hidden),
            "ffn_up": (ffn, hidden),
            "ffn_down": (hidden, ffn),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    shapes["output_norm"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["output"] = (config.vocab_size, hidden)
    return shapes


def _type(name: str, dimensions: int, mix: str, config: LlamaConfig) -> Type:
    if dimensions == 1:
        return Type.F32
    if mix != "q4_k_m":
        return Type[mix.upper()]
    if name == "output" or (name == "token_embd" and config.tie_word_embeddings):
        return Type.Q6_K
    if name.endswith(("attn_v", "ffn_down")):
        layer, layers = int(name.split(".")[1]), config.num_hidden_layers
        eighth = layers // 8
        if layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2:
            return Type.Q6_K
    return Type.Q4_K


def _bytes_of_rows(shape: tuple[int, ...], kind: Type) -> tuple[int, ...]:
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    return (*shape[:-1], shape[-1] // weights * size)


def _blocks(
    generator: np.random.Generator, shape: tuple[int, ...], kind: Type
) -> tuple[np.ndarray, np.ndarray]:
    """Return random rows, and the same memory as [blocks, bytes of a block]."""
    rows = np.frombuffer(bytearray(generator.bytes(int(np.prod(shape)))), np.uint8).reshape(shape)
    return rows, rows.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])


def _half(value: float) -> np.ndarray:
    return np.array([value], np.float16).view(np.uint8)


def _bf16(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    values = generator.standard_normal((shape[0], shape[1] // 2), np.float32) * DEVIATION
    return np.ascontiguousarray(values.view(np.uint16)[:, 1::2]).view(np.uint8)


def _q4_0(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    rows, blocks = _blocks(generator, shape, Type.Q4_0)
    blocks[:, :2] = _half(DEVIATION / 4.6)
    return rows


def _q8_0(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    rows, blocks = _blocks(generator, shape, Type.Q8_0)
    blocks[:, :2] = _half(DEVIATION / 74)
    return rows


def _q4_k(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    rows, blocks = _blocks(generator, shape, Type.Q4_K)
    scale = DEVIATION / (32 * 8)
    blocks[:, :2], blocks[:, 2:4] = _half(scale), _half(7.5 * scale)
    return rows


def _q6_k(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    rows, blocks = _blocks(generator, shape, Type.Q6_K)
    scales = blocks[:, 192:208].view(np.int8)
    scales //= 8  # from -16 to 15
    blocks[:, 208:] = _half(DEVIATION / (9.2 * 18.5))
    return rows


_RANDOM: dict[Type, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    Type.BF16: _bf16,
    Type.Q4_0: _q4_0,
    Type.Q8_0: _q8_0,
    Type.Q4_K: _q4_k,
    Type.Q6_K: _q6_k,
}
