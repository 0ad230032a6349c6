"""Checkpoints in Meta's own layout: params.json next to consolidated.00.pth, consolidated.01.pth...

Each file is what one rank of a tensor-parallel group held. Query and key rows lie in interleaved
rotary order, which reading undoes. checklist.chk, where it is there, names the files with their
MD5. That all are there and whole is checked on opening; the sums of weights are left to
`md5sum -c checklist.chk`, for they take a pass over all bytes.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cptool.checkpoint.base import (
    EMBEDDING,
    HEAD,
    TORCH_DTYPES,
    Checkpoint,
    JoinedTensor,
    StoredTensor,
    check_config,
    mark_interleaved,
    select_tensors,
)
from cptool.checkpoint.fields import flag, integer, number, read_json
from cptool.checkpoint.known_fields import PARAMS as PARAMS_FIELDS
from cptool.checkpoint.known_fields import check_fields, note_of_unknown
from cptool.checkpoint.lookalikes import absent, dangling
from cptool.checkpoint.tokenizer_model import TokenizerModel, read_tokenizer_model
from cptool.checkpoint.torch_file import read_header
from cptool.errors import UserError
from cptool.model.config import LlamaConfig, RopeScaling

PARAMS = "params.json"

_ROWS, _COLUMNS = 0, 1

# The Hugging Face name of each weight, and the dimension along which the files divide it; None
# where each file has it whole.
_WEIGHTS: dict[str, tuple[str, int | None]] = {
    "attention.wq": ("self_attn.q_proj", _ROWS),
    "attention.wk": ("self_attn.k_proj", _ROWS),
    "attention.wv": ("self_attn.v_proj", _ROWS),
    "attention.wo": ("self_attn.o_proj", _COLUMNS),
    "feed_forward.w1": ("mlp.gate_proj", _ROWS),
    "feed_forward.w2": ("mlp.down_proj", _COLUMNS),
    "feed_forward.w3": ("mlp.up_proj", _ROWS),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
    "norm": ("model.norm", None),
    "output": ("lm_head", _ROWS),
}
_FIRST_GATE = "model.layers.0.mlp.gate_proj.weight"

# The releases by their rotary base; params.json does not have the context.
_CONTEXTS = {1e4: 4096, 5e5: 8192, 1e6: 16384}
_LLAMA1_CONTEXT, _LLAMA1_EPS = 2048, 1e-6
_SCALED_CONTEXT = 131072

# Meta's code stretches by 8; Llama 3.2's small models are published with 32, by (width, layers).
_SCALING_FACTOR = 8.0
_SCALING_FACTORS = {(2048, 16): 32.0, (3072, 28): 32.0}


def is_meta(path: Path) -> bool:
    """Whether the directory is in this layout, and not in Hugging Face's as well."""
    found = (path / PARAMS).is_file() or any(path.glob("consolidated*.pth"))
    return found and not any(path.glob("model*.safetensors"))


def open_meta(path: Path, name: str | None = None) -> Checkpoint:
    """Opens and validates the directory `path`.

    UserError for anything that is missing, damaged or not a plain Llama.
    """
    params_file = path / PARAMS
    if not params_file.is_file():
        raise UserError(f"{params_file}: {absent(params_file)} beside the weights; fetch it too")
    params = read_json(params_file)
    unknown = check_fields(params_file, params, PARAMS_FIELDS)
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: an adapter (adapter_config.json) lies beside a model ({PARAMS}), and cptool "
            f"computes no adapters; move it away to use the model alone"
        )
    heads = integer(params_file, params, "n_heads")
    kv_heads = integer(params_file, params, "n_kv_heads", heads)
    hidden = integer(params_file, params, "dim")
    if heads < 1 or kv_heads < 1 or hidden < 1 or (hidden % heads and "head_dim" not in params):
        raise UserError(
            f"{params_file}: dim {hidden} with {heads} heads on {kv_heads} key/value heads makes "
            f"no head size; mend the file"
        )
    found = _join_files(_find_files(path), hidden, kv_heads)
    config = check_config(params_file, _read_config(params_file, params, found))
    stored = select_tensors(path, config, found, TORCH_DTYPES)
    tokens = _read_tokenizer(path, config.vocab_size)
    return Checkpoint(
        path=path,
        name=name or path.resolve().name,
        config=config,
        stored=mark_interleaved(stored, config),
        eos_ids=tokens.eos_ids if tokens else (),
        bos_id=tokens.bos_id if tokens else None,
        notes=note_of_unknown(unknown),
        load_tokenizer=tokens.tokenizer if tokens else lambda: None,
    )


def _read_tokenizer(path: Path, vocab_size: int) -> TokenizerModel | None:
    """The tokenizer.model beside the weights, or one directory up; None where there is none."""
    for directory in (path, path.resolve().parent):
        file = directory / "tokenizer.model"
        if not file.is_file():
            continue
        # A damaged token would go unnoticed otherwise, and the file is small.
        found = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
        expected = _checksums(directory).get(file.name, found)
        if found != expected:
            raise UserError(
                f"{file}: its MD5 is {found}, the checklist beside it says {expected}; fetch it "
                f"again"
            )
        tokens = read_tokenizer_model(file)
        if tokens.size != vocab_size:  # As in every release; one directory up may lie another's.
            raise UserError(
                f"{file}: it has {tokens.size} tokens and the model {vocab_size}; put the model's "
                f"own tokenizer.model into {path}"
            )
        return tokens
    return None


def _read_config(
    source: Path, params: dict[str, Any], found: dict[str, StoredTensor | JoinedTensor]
) -> LlamaConfig:
    """The model's shape out of params.json and, for what is not there or may be -1, the tensors."""
    for needed in (EMBEDDING, _FIRST_GATE):
        if needed not in found:
            raise UserError(
                f"{source}: the weights beside it hold no {needed}, as a Llama's do; use a "
                f"checkpoint of the Llama architecture"
            )
    heads, hidden = integer(source, params, "n_heads"), integer(source, params, "dim")
    layers = integer(source, params, "n_layers")
    # Where the output matrix is the embedding, it is absent or in the same place.
    tied = HEAD not in found or found[HEAD] == found[EMBEDDING]
    scaling = None
    if flag(source, params, "use_scaled_rope"):
        usual = _SCALING_FACTORS.get((hidden, layers), _SCALING_FACTOR)
        factor = number(source, params, "rope_scaling_factor", usual)
        high = number(source, params, "rope_high_freq_factor", RopeScaling.high_freq_factor)
        if not (factor > 0 and high > RopeScaling.low_freq_factor):
            raise UserError(
                f"{source}: rope_scaling_factor {factor} and rope_high_freq_factor {high} make no "
                f"sense; they must be over 0 and over {RopeScaling.low_freq_factor}"
            )
        scaling = RopeScaling("llama3", factor, high_freq_factor=high)
    vocabulary = found[EMBEDDING].shape[:1]
    if (said := params.get("vocab_size")) is not None and said != -1:
        if (integer(source, params, "vocab_size"),) != vocabulary:
            raise UserError(
                f"{source}: vocab_size is {said}, and the embedding beside it has the shape "
                f"{list(found[EMBEDDING].shape)}; the two are not of one model"
            )
    for key in ("rope_scaling_factor", "rope_high_freq_factor"):
        if scaling is None and params.get(key) is not None and number(source, params, key) != 1:
            raise UserError(
                f"{source}: {key} is {number(source, params, key)} without use_scaled_rope, which "
                f"it belongs to; correct the file"
            )
    theta = number(source, params, "rope_theta", 10000.0)
    eps = number(source, params, "norm_eps")
    return LlamaConfig(
        vocab_size=found[EMBEDDING].shape[0],
        hidden_size=hidden,
        intermediate_size=found[_FIRST_GATE].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=integer(source, params, "n_kv_heads", heads),
        head_dim=integer(source, params, "head_dim", hidden // heads),
        rms_norm_eps=eps,
        rope_theta=theta,
        max_position_embeddings=_context(source, params, theta, eps),
        tie_word_embeddings=tied,
        rope_scaling=scaling,
    )


def _context(source: Path, params: dict[str, Any], theta: float, eps: float) -> int:
    """How many positions the release was made for: `max_seq_len`, which no release has and users
    may add, or what its rotary embedding tells.
    """
    if params.get("max_seq_len") is not None:
        return integer(source, params, "max_seq_len")
    if params.get("use_scaled_rope"):
        return _SCALED_CONTEXT
    if theta not in _CONTEXTS:
        raise UserError(
            f"{source}: rope_theta is {theta}, which no Llama of Meta's has, so the context is not "
            f'known; add "max_seq_len" to the file'
        )
    return _LLAMA1_CONTEXT if (theta, eps) == (1e4, _LLAMA1_EPS) else _CONTEXTS[theta]


def _find_files(path: Path) -> list[Path]:
    """The weight files in the order of their ranks; UserError where one is missing."""
    files = sorted(path.glob("consolidated*.pth"))
    for file in files:
        if (why := dangling(file)) is not None:
            raise UserError(f"{file}: {why}")
    expected = {f"consolidated.{i:02}.pth" for i in range(len(files))}
    if len(files) == 1:
        expected = {files[0].name} & {"consolidated.pth", *expected}
    listed = {name for name in _checksums(path) if name.startswith("consolidated")}
    if missing := sorted((listed | expected) - {file.name for file in files}):
        raise UserError(
            f"{path}: {missing[0]} is missing beside {len(files)} other files of weights; fetch it"
        )
    if not expected and any(path.glob("consolidated*.safetensors")):
        raise UserError(
            f"{path}: its weights are in Mistral's own layout, which is not supported; use a "
            f"checkpoint of the model in the Hugging Face layout, or a GGUF of it"
        )
    if not expected:
        raise UserError(f"{path}: no consolidated.00.pth in it; fetch the weights")
    return files


def _checksums(directory: Path) -> dict[str, str]:
    """MD5 by file name, out of the lists that Meta puts beside the files; they may be missing."""
    lines = [
        line.split()
        for file in sorted(directory.glob("*checklist.chk"))
        for line in file.read_text("utf-8", errors="replace").splitlines()
    ]
    return {Path(words[1]).name: words[0] for words in lines if len(words) == 2}


def _join_files(
    files: Sequence[Path], hidden: int, kv_heads: int
) -> dict[str, StoredTensor | JoinedTensor]:
    """All tensors by their Hugging Face names, each of the parts that the files have of it."""
    headers = [read_header(file) for file in files]
    first = headers[0]
    for file, header in zip(files[1:], headers[1:], strict=True):
        for name in sorted(first.keys() | header.keys()):
            a, b = first.get(name), header.get(name)
            if a is None or b is None or (a.shape, a.encoding) != (b.shape, b.encoding):
                raise UserError(
                    f"{file}: tensor {name!r} is not as in {files[0].name}; the files are not of "
                    f"one model, fetch them again"
                )
    found = {}
    for name in first.keys() - {"rope.freqs"}:  # Older files store what rope_theta says.
        parts = tuple(header[name] for header in headers)
        theirs, dim = _target(name, parts[0].shape, hidden)
        if theirs.endswith(("k_proj.weight", "v_proj.weight")) and len(parts) % kv_heads == 0:
            # More files than heads: each head lies in several, one after the other.
            parts = parts[:: len(parts) // kv_heads]
        whole = dim is None or len(parts) == 1
        found[theirs] = parts[0] if whole else JoinedTensor(parts, dim)
    return found


def _target(name: str, shape: tuple[int, ...], hidden: int) -> tuple[str, int | None]:
    """The Hugging Face name of a tensor, and the dimension along which its parts are joined.

    A name that no Llama has stays as it is.
    """
    if name == "tok_embeddings.weight":
        # Llama 1 and 2 divide the width, Llama 3 the vocabulary.
        return EMBEDDING, _ROWS if shape[-1:] == (hidden,) else _COLUMNS
    match = re.fullmatch(r"(?:layers\.(\d+)\.)?([\w.]+)\.weight", name)
    if match is None or match[2] not in _WEIGHTS:
        return name, None
    theirs, dim = _WEIGHTS[match[2]]
    return f"{'' if match[1] is None else f'model.layers.{match[1]}.'}{theirs}.weight", dim
