"""Checkpoints in GGUF, the one-file format of llama.cpp.

Matrices may be quantised; they are dequantised to float32 by the `gguf` package. Query and key rows
lie in interleaved rotary order (Meta's), which reading undoes. Llama 3.1 scaling is not in the
metadata but in a tensor `rope_freqs.weight` of one divisor per frequency.
"""

import math
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptool.checkpoint.base import (
    TORCH_DTYPES,
    Checkpoint,
    Sampling,
    StoredTensor,
    check_config,
    mark_interleaved,
    select_tensors,
    token_ids,
)
from cptool.checkpoint.gguf_header import Header, read_header
from cptool.errors import UserError
from cptool.model.config import LlamaConfig, RopeScaling

if TYPE_CHECKING:
    import torch

    from cptool.checkpoint.tokenizer import Tokenizer

QUANTISED = (
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4"),
)

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_DIVISORS = "rope_freqs.weight"

# Features of other models under the same architecture name, and the values that switch them off.
_UNSUPPORTED = {
    "llama.expert_count": 0,
    "llama.attention.sliding_window": 0,
    "llama.attention.scale": 0.0,
    "llama.logit_scale": 0.0,
    "llama.residual_scale": 0.0,
    "llama.embedding_scale": 0.0,
}


def open_gguf(path: Path, name: str | None = None) -> Checkpoint:
    """Opens and validates the file `path`; UserError if it is damaged or not a plain Llama."""
    header = read_header(path)
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{path}: architecture {architecture!r} is not supported; use a GGUF of a llama model"
        )
    for key, off in _UNSUPPORTED.items():
        value = metadata.get(key, off)
        if value != off:
            raise UserError(
                f"{path}: {key} is {value!r}, which is not supported; use a checkpoint without it"
            )
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise UserError(
            f"{path}: one of {parts!r} parts, a model must be one file; join them with llama.cpp's "
            f"gguf-split --merge"
        )
    found = {_canonical(key): tensor for key, tensor in header.tensors.items()}
    divisors = found.pop(_ROPE_DIVISORS, None)
    config = check_config(path, _read_config(path, header))
    if divisors is not None:
        config = replace(config, rope_scaling=_scaling_of_divisors(path, config, divisors))
    stored = select_tensors(path, config, found, (*TORCH_DTYPES, *QUANTISED))
    ids = {
        name: token_ids(path, key, metadata.get(key), config.vocab_size)
        for name in ("bos", "eos", "eot", "eom")
        for key in [f"tokenizer.ggml.{name}_token_id"]
    }
    return Checkpoint(
        path=path,
        name=name or path.stem,
        config=config,
        stored=mark_interleaved(stored, config),
        eos_ids=tuple(dict.fromkeys(ids["eos"] + ids["eot"] + ids["eom"])),
        bos_id=next(iter(ids["bos"]), None),
        sampling=Sampling(
            metadata.get("general.sampling.temp"), metadata.get("general.sampling.top_p")
        ),
        load_tokenizer=lambda: _load_tokenizer(path, metadata),
    )


def dequantize(stored_bytes: "torch.Tensor", tensor: StoredTensor) -> "torch.Tensor":
    """The float32 values of a quantised tensor, in its logical shape."""
    import torch
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as to_float32

    rows = stored_bytes.numpy().reshape(math.prod(tensor.shape[:-1]), -1)
    values = to_float32(rows, GGMLQuantizationType[tensor.encoding])
    return torch.from_numpy(values).view(tensor.shape)


def _canonical(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name that no Llama has stays as it is."""
    if match := re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name):
        layer, part = match.groups()
        if part in _NAMES:
            return f"{'' if layer is None else f'model.layers.{layer}.'}{_NAMES[part]}.weight"
    return name


def _read_config(path: Path, header: Header) -> LlamaConfig:
    metadata, tensors = header.metadata, header.tensors
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{path}: tensor token_embd.weight is missing; fetch the file again")
    hidden = _value(path, metadata, "llama.embedding_length", int)
    heads = _value(path, metadata, "llama.attention.head_count", int)
    head_dim = _value(
        path, metadata, "llama.attention.key_length", int, hidden // heads if heads else 0
    )
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if (value := _value(path, metadata, key, int, head_dim)) != head_dim:
            raise UserError(
                f"{path}: {key} is {value}, cptool needs it to equal the head size {head_dim}; use "
                f"another model"
            )
    return LlamaConfig(
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        intermediate_size=_value(path, metadata, "llama.feed_forward_length", int),
        num_hidden_layers=_value(path, metadata, "llama.block_count", int),
        num_attention_heads=heads,
        num_key_value_heads=_value(path, metadata, "llama.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        rms_norm_eps=_value(path, metadata, "llama.attention.layer_norm_rms_epsilon", float),
        rope_theta=_value(path, metadata, "llama.rope.freq_base", float, 10000.0),
        max_position_embeddings=_value(path, metadata, "llama.context_length", int),
        tie_word_embeddings="output.weight" not in tensors,
        rope_scaling=_linear_scaling(path, metadata),
    )


def _linear_scaling(path: Path, metadata: dict[str, Any]) -> RopeScaling | None:
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise UserError(
            f"{path}: rope scaling {kind!r} is not supported; use a model without scaling, or with "
            f"linear or llama3 scaling"
        )
    factor = _value(path, metadata, "llama.rope.scaling.factor", float)
    if not factor > 0:
        raise UserError(f"{path}: llama.rope.scaling.factor is {factor}, it must be positive")
    return RopeScaling("linear", factor)


def _scaling_of_divisors(
    path: Path, config: LlamaConfig, tensor: StoredTensor
) -> RopeScaling | None:
    """The llama3 scaling whose divisors are those stored; UserError where none is.

    Converters write divisor = inverse frequency / scaled inverse frequency in float32: 1 for short
    wavelengths, `factor` for long ones. Every published model has the formula's default bands.
    """
    half = config.head_dim // 2
    if tensor.shape != (half,) or tensor.encoding != "F32" or config.rope_scaling is not None:
        raise UserError(
            f"{path}: {_ROPE_DIVISORS} has shape {list(tensor.shape)} in {tensor.encoding}; it "
            f"must hold {half} float32 divisors and come without other rope scaling"
        )
    with path.open("rb") as file:
        file.seek(tensor.offset)
        divisors = struct.unpack(f"<{half}f", file.read(tensor.nbytes))
    if all(divisor == 1 for divisor in divisors):
        return None
    scaling = RopeScaling("llama3", _shortest(divisors[-1]))
    expected = [
        _llama3_divisor(2 * math.pi * config.rope_theta ** (j / half), scaling) for j in range(half)
    ]
    # Float32 powers in a converter are off by a few ulp times ln(theta), other bands by far more.
    if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(divisors, expected, strict=True)):
        raise UserError(
            f"{path}: the divisors in {_ROPE_DIVISORS} are not those of llama3 scaling, the only "
            f"kind supported there; use a Hugging Face checkpoint of the model"
        )
    return scaling


def _llama3_divisor(wavelength: float, scaling: RopeScaling) -> float:
    turns = scaling.original_context / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
    return 1 / ((1 - smooth) / scaling.factor + smooth)


def _value(path: Path, metadata: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = metadata.get(key, default)
    if type(value) is not kind:
        raise UserError(
            f"{path}: {key} is {'missing' if value is None else repr(value)[:40]}, it must be "
            f"{'an integer' if kind is int else 'a number'}; convert the model anew"
        )
    return _shortest(value) if kind is float else value


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-5, not 9.99999974737875e-06.

    So that the same model from a float32 field and from JSON text computes with the same number.
    """
    if not math.isfinite(value):
        return value
    for digits in range(1, 10):
        decimal = float(f"{value:.{digits}g}")
        if abs(decimal) < 3.5e38 and struct.pack("<f", decimal) == struct.pack("<f", value):
            return decimal
    return value


def _load_tokenizer(path: Path, metadata: dict[str, Any]) -> "Tokenizer | None":
    from cptool.checkpoint.tokenizer import from_gguf

    return from_gguf(path, metadata)
