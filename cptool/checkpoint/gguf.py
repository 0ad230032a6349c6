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
from cptool.checkpoint.fields import number, shown
from cptool.checkpoint.gguf_header import Header, read_header
from cptool.checkpoint.kinds import check_names
from cptool.checkpoint.known_fields import GGUF, check_fields, note_of_unknown
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

# llama.cpp's defaults of a SentencePiece vocabulary.
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2}


def open_gguf(path: Path, name: str | None = None) -> Checkpoint:
    """Opens and validates the file `path`; UserError if it is damaged or not a plain Llama."""
    header = read_header(path)
    metadata = header.metadata
    _check_kind(path, metadata)
    unknown = check_fields(path, metadata, GGUF)
    check_names(path, header.tensors)
    notes: list[str] = []
    found = {_canonical(key): tensor for key, tensor in header.tensors.items()}
    divisors = found.pop(_ROPE_DIVISORS, None)
    config = check_config(path, _read_config(path, header, notes))
    if divisors is not None:
        scaling = _scaling_of_divisors(path, config, divisors)
        config = check_config(path, replace(config, rope_scaling=scaling))
    stored = select_tensors(path, config, found, (*TORCH_DTYPES, *QUANTISED))
    defaults = _SENTENCEPIECE_IDS if metadata.get("tokenizer.ggml.model") == "llama" else {}
    ids = {
        name: token_ids(path, key, metadata.get(key, defaults.get(name)), config.vocab_size)
        for name in ("bos", "eos", "eot", "eom")
        for key in [f"tokenizer.ggml.{name}_token_id"]
    }
    several = "tokenizer.ggml.eos_token_ids"  # As ollama writes them beside the first one.
    ids["eos"] += token_ids(path, several, metadata.get(several), config.vocab_size)
    return Checkpoint(
        path=path,
        name=name or path.stem,
        config=config,
        stored=mark_interleaved(stored, config),
        eos_ids=tuple(dict.fromkeys(ids["eos"] + ids["eot"] + ids["eom"])),
        bos_id=next(iter(ids["bos"]), None),
        sampling=Sampling(
            *(
                number(path, metadata, key) if metadata.get(key) is not None else None
                for key in ("general.sampling.temp", "general.sampling.top_p")
            )
        ),
        notes=(*notes, *note_of_unknown(unknown)),
        load_tokenizer=lambda: _load_tokenizer(path, metadata),
    )


def _check_kind(path: Path, metadata: dict[str, Any]) -> None:
    """Refuses sound files that are not a whole Llama, for what they are."""
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):
        at = metadata.get("split.no")
        place = f"part {at + 1} of {parts}" if type(at) is int else f"one of {shown(parts)} parts"
        raise UserError(
            f"{path}: {place}, and a model must be one file; join its parts with llama.cpp's "
            f"gguf-split --merge"
        )
    kind = metadata.get("general.type", "model")
    if kind == "adapter" or "adapter.type" in metadata:
        raise UserError(
            f"{path}: an adapter (LoRA), not a model; merge it into its base model first, with "
            f"llama.cpp's export-lora, and give the result"
        )
    if kind != "model":
        what = {
            "imatrix": "an importance matrix",
            "mmproj": "a projector of images or sound",
            "vocab": "a vocabulary",
            "clip-vision": "an encoder of images",
        }.get(kind if isinstance(kind, str) else "", f"a file of type {shown(kind)}")
        raise UserError(f"{path}: {what}, not a model; give the GGUF of the model itself")
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        missing = architecture is None
        named = "not named in it" if missing else f"{shown(architecture)}, which is not supported"
        raise UserError(f"{path}: its architecture is {named}; use a GGUF of a llama model")
    if metadata.get("llama.pooling_type", 0) not in (0, None):
        raise UserError(
            f"{path}: llama.pooling_type is {shown(metadata['llama.pooling_type'])}, as embedding "
            f"models have; use a model that generates text"
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


def _read_config(path: Path, header: Header, notes: list[str]) -> LlamaConfig:
    metadata, tensors = header.metadata, header.tensors
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        what = "a vocabulary alone" if not tensors else "not a whole model"
        raise UserError(
            f"{path}: tensor token_embd.weight is missing, so it is {what}; give the GGUF of the "
            f"model itself"
        )
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
    vocabulary = embedding.shape[0]
    if (said := _value(path, metadata, "llama.vocab_size", int, vocabulary)) != vocabulary:
        raise UserError(
            f"{path}: llama.vocab_size is {said}, and token_embd.weight has {vocabulary} rows; the "
            f"two are not of one model"
        )
    scaling = _linear_scaling(path, metadata, notes)
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=_value(path, metadata, "llama.feed_forward_length", int),
        num_hidden_layers=_value(path, metadata, "llama.block_count", int),
        num_attention_heads=heads,
        num_key_value_heads=_value(path, metadata, "llama.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        rms_norm_eps=_value(path, metadata, "llama.attention.layer_norm_rms_epsilon", float),
        rope_theta=_value(path, metadata, "llama.rope.freq_base", float, 10000.0),
        max_position_embeddings=_context(path, metadata, scaling),
        tie_word_embeddings="output.weight" not in tensors,
        rope_scaling=scaling,
    )


def _linear_scaling(path: Path, metadata: dict[str, Any], notes: list[str]) -> RopeScaling | None:
    """As llama.cpp reads it: a factor without a type is linear, the older key counts where there is
    no newer one, 0 is no factor, and type none leaves a factor out.
    """
    newer, older = (
        None if metadata.get(key) is None else _value(path, metadata, key, float)
        for key in ("llama.rope.scaling.factor", "llama.rope.scale_linear")
    )
    if newer is not None and older is not None and newer != older:
        raise UserError(
            f"{path}: llama.rope.scaling.factor is {newer} and llama.rope.scale_linear {older}; "
            f"convert the model anew"
        )
    factor = older if newer is None else newer
    kind = metadata.get("llama.rope.scaling.type", "linear")
    if kind == "none":
        if factor not in (None, 0, 1):
            notes.append(
                f"{path}: llama.rope.scaling.type is none, so the factor {factor} beside it does "
                f"not count"
            )
        return None
    if kind != "linear":
        raise UserError(
            f"{path}: rope scaling {shown(kind)} is not supported; use a model without scaling, or "
            f"with linear or llama3 scaling"
        )
    return RopeScaling("linear", factor) if factor not in (None, 0, 1) else None


def _context(path: Path, metadata: dict[str, Any], scaling: RopeScaling | None) -> int:
    """How many positions the model was made for; linear scaling stretches the original ones."""
    positions = _value(path, metadata, "llama.context_length", int)
    if scaling is None or not 0 < scaling.factor < 2**31:
        return positions
    key = "llama.rope.scaling.original_context_length"
    original = _value(path, metadata, key, int, positions)
    return max(positions, int(original * scaling.factor))


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
    if not all(math.isfinite(divisor) and divisor > 0 for divisor in divisors):
        raise UserError(
            f"{path}: {_ROPE_DIVISORS} holds a divisor that is not positive and finite; convert "
            f"the model anew"
        )
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
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]  # One value for each layer, and all the same.
    if isinstance(value, list) and all(type(item) is kind for item in value) and value:
        raise UserError(
            f"{path}: {key} is {shown(value)}, cptool computes layers of one shape alone; use "
            f"another model"
        )
    if type(value) is not kind:
        raise UserError(
            f"{path}: {key} is {'missing' if value is None else shown(value)}, it must be "
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
