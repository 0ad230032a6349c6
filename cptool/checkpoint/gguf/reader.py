"""Checkpoints in GGUF, the format of llama.cpp: one file, or several (`parts.py`).

Matrices may be quantised; they are dequantised to float32 by the `gguf` package. Rotated rows may
be in interleaved rotary order (Meta's), which reading undoes. Llama 3.1 scaling is not in the
metadata but in a tensor `rope_freqs.weight` of one divisor per frequency.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptool.checkpoint.base import Checkpoint
from cptool.checkpoint.config_checks import check_config
from cptool.checkpoint.fields import shown, token_ids
from cptool.checkpoint.gguf.config import read_config
from cptool.checkpoint.gguf.header import Header
from cptool.checkpoint.gguf.known import known_metadata
from cptool.checkpoint.gguf.metadata import Metadata
from cptool.checkpoint.gguf.parts import read_model, title
from cptool.checkpoint.gguf.rope import ROPE_DIVISORS, long_rope, scaling_of_divisors, take_factors
from cptool.checkpoint.known_fields import check_fields
from cptool.checkpoint.notes import Notes
from cptool.checkpoint.other_models import kind_of
from cptool.checkpoint.sampling import read_sampling
from cptool.checkpoint.selection import (
    flattened,
    mark_interleaved,
    select_tensors,
    split_fused,
)
from cptool.checkpoint.tensor_names import check_names
from cptool.checkpoint.tensors import TORCH_DTYPES, AnyTensor
from cptool.errors import UserError
from cptool.model.architectures.family import Family
from cptool.model.architectures.registry import families
from cptool.model.config import LlamaConfig

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer

QUANTISED = (
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4"),
)

# llama.cpp's defaults of a SentencePiece vocabulary.
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2}

_OTHER_KINDS = {
    "imatrix": "an importance matrix",
    "mmproj": "a projector of images or sound",
    "vocab": "a vocabulary",
    "clip-vision": "an encoder of images",
}


def open_gguf(path: Path, name: str | None = None) -> Checkpoint:
    """Open and validate the model of which `path` is the file, or one of the files.

    Raises UserError if it is damaged or not a model that cptool computes.
    """
    path, header = read_model(path)
    metadata = header.metadata
    family = _check_kind(path, metadata)
    notes = Notes()
    check_fields(path, metadata, known_metadata(family), notes)
    config, stored = _read_model(path, header, family, notes)
    defaults = _SENTENCEPIECE_IDS if metadata.get("tokenizer.ggml.model") == "llama" else {}
    ids = {
        role: token_ids(path, key, metadata.get(key, defaults.get(role)), config.vocab_size)
        for role in ("bos", "eos", "eot", "eom")
        for key in [f"tokenizer.ggml.{role}_token_id"]
    }
    several = "tokenizer.ggml.eos_token_ids"  # As ollama writes them beside the first one.
    ids["eos"] += token_ids(path, several, metadata.get(several), config.vocab_size)
    names = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
    return Checkpoint(
        path=path,
        name=name or title(path),
        config=config,
        stored=stored,
        eos_ids=tuple(dict.fromkeys(ids["eos"] + ids["eot"] + ids["eom"])),
        bos_id=next(iter(ids["bos"]), None),
        sampling=read_sampling(
            path, metadata, {own: f"general.sampling.{name}" for own, name in names.items()}, notes
        ),
        notes=notes.lines(),
        load_tokenizer=lambda: _load_tokenizer(path, metadata, family),
    )


def _check_kind(path: Path, metadata: dict[str, Any]) -> Family:
    """Return the family of the model; refuse sound files that are not a whole model."""
    kind = metadata.get("general.type", "model")
    if kind == "adapter" or "adapter.type" in metadata:
        raise UserError(
            f"{path}: an adapter (LoRA), not a model; merge it into its base model first, with "
            f"llama.cpp's export-lora, and give the result"
        )
    if kind != "model":
        what = _OTHER_KINDS.get(kind if isinstance(kind, str) else "")
        what = what or f"a file of type {shown(kind)}"
        raise UserError(f"{path}: {what}, not a model; give the GGUF of the model itself")
    architecture = metadata.get("general.architecture")
    family = _family_of(metadata)
    if family is None:
        why = kind_of(architecture) or "which is not supported"
        missing = architecture is None
        named = "not named in it" if missing else f"{shown(architecture)}, {why}"
        raise UserError(
            f"{path}: its architecture is {named}; use one of those that `cptool models` lists"
        )
    pooling = f"{architecture}.pooling_type"
    if metadata.get(pooling, 0) not in (0, None):
        raise UserError(
            f"{path}: {pooling} is {shown(metadata[pooling])}, as embedding models have; use a "
            f"model that generates text"
        )
    return family


def _family_of(metadata: dict[str, Any]) -> Family | None:
    """Return the family that the metadata names, None if it names none that cptool knows."""
    architecture = metadata.get("general.architecture")
    named = [family for family in families() if family.gguf == architecture and family.gguf]
    for family in named:
        if family.gguf_mark is not None and metadata.get(f"{architecture}.{family.gguf_mark}"):
            return family
    return next((family for family in named if family.gguf_mark is None), None)


def _read_model(
    path: Path, header: Header, family: Family, notes: Notes
) -> tuple[LlamaConfig, dict[str, AnyTensor]]:
    """Return the model's shape, and its tensors by their Hugging Face names."""
    found = {family.huggingface_name(key, "gguf"): t for key, t in header.tensors.items()}
    check_names(path, found, family)
    divisors, factors = found.pop(ROPE_DIVISORS, None), take_factors(path, found)
    metadata = Metadata(path, header.metadata, str(family.gguf))
    config = check_config(path, read_config(metadata, header.tensors, family, notes))
    if divisors is not None:
        scaling = scaling_of_divisors(path, config, divisors)
        config = check_config(path, replace(config, rope_scaling=scaling))
    if factors is not None:
        scaling = long_rope(metadata, config, factors)
        config = check_config(path, replace(config, rope_scaling=scaling))
    found = flattened(config, split_fused(path, config, found))
    stored = select_tensors(path, config, found, (*TORCH_DTYPES, *QUANTISED))
    return config, mark_interleaved(stored, config) if family.gguf_interleaved else stored


def _load_tokenizer(path: Path, metadata: dict[str, Any], family: Family) -> "Tokenizer | None":
    from cptool.checkpoint.tokenizer.gguf import from_gguf

    return from_gguf(path, metadata, family.chat_template)
