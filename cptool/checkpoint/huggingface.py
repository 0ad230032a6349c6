"""Checkpoints in the Hugging Face layout: config.json next to safetensors files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptool.checkpoint.base import (
    HEAD,
    TORCH_DTYPES,
    Checkpoint,
    Sampling,
    StoredTensor,
    check_config,
    select_tensors,
    token_ids,
)
from cptool.checkpoint.fields import integer, mapping, number, read_json
from cptool.checkpoint.safetensors import read_header
from cptool.errors import UserError
from cptool.model.config import LlamaConfig, RopeScaling

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer import Tokenizer

_CONVERT = "convert the checkpoint to safetensors with transformers' save_pretrained"

# What cptool's Llama does not have, and the values under which it is not asked for.
_UNSUPPORTED = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "sliding_window": (None, 0),
    "quantization_config": (None,),
    "use_qk_norm": (None, False),
    "qk_norm": (None, False),
    "hidden_act": (None, "silu"),
    "partial_rotary_factor": (None, 1, 1.0),
}


def open_huggingface(path: Path, name: str | None = None) -> Checkpoint:
    """Opens and validates the directory `path`.

    UserError for anything that is missing, damaged or not a plain Llama.
    """
    config_file = path / "config.json"
    if not config_file.is_file():
        raise UserError(_why_no_config(path))
    fields = read_json(config_file)
    found = {
        name: tensor
        for name, tensor in _read_headers(path).items()
        if not name.endswith("rotary_emb.inv_freq")  # Older files store what rope_theta says.
    }
    config = check_config(config_file, read_config(config_file, fields, tied=HEAD not in found))
    generation_file = path / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    chosen = {**fields, **{key: value for key, value in generation.items() if value is not None}}
    eos_ids, bos_ids = (
        token_ids(path, key, chosen.get(key), config.vocab_size)
        for key in ("eos_token_id", "bos_token_id")
    )
    return Checkpoint(
        path=path,
        name=name or path.resolve().name,
        config=config,
        stored=select_tensors(path, config, found, TORCH_DTYPES),
        eos_ids=eos_ids,
        bos_id=next(iter(bos_ids), None),
        sampling=_sampling(generation),
        load_tokenizer=lambda: _load_tokenizer(path),
    )


def read_config(source: Path, fields: dict[str, Any], tied: bool = False) -> LlamaConfig:
    """The model's shape out of the fields of a `config.json`, of transformers 4 or 5.

    `tied` says that the files hold no output matrix, so that the embedding serves.
    """
    architectures = fields.get("architectures") or ["LlamaForCausalLM"]
    if architectures != ["LlamaForCausalLM"] or fields.get("model_type", "llama") != "llama":
        raise UserError(
            f"{source}: architecture {architectures!r} of type {fields.get('model_type')!r} is not "
            f"supported; use a LlamaForCausalLM checkpoint"
        )
    # transformers 5 gathers rope_theta and rope_scaling in one dict.
    rope = {
        **mapping(source, fields, "rope_scaling"),
        **mapping(source, fields, "rope_parameters"),
    }
    for key, allowed in _UNSUPPORTED.items():
        value = fields.get(key, rope.get(key))
        if value not in allowed:
            raise UserError(
                f"{source}: {key} is {value!r}, cptool computes only a Llama where it is absent or "
                f"{allowed[-1]!r}; use a checkpoint without it"
            )
    heads = integer(source, fields, "num_attention_heads")
    hidden = integer(source, fields, "hidden_size")
    if fields.get("head_dim") is None and (heads < 1 or hidden % heads):
        raise UserError(
            f"{source}: hidden_size {hidden} does not divide into {heads} heads; it must, or "
            f"head_dim must be given"
        )
    theta = number(source, {**fields, **rope}, "rope_theta", 10000.0)
    return LlamaConfig(
        vocab_size=integer(source, fields, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer(source, fields, "intermediate_size"),
        num_hidden_layers=integer(source, fields, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=integer(source, fields, "num_key_value_heads", heads),
        head_dim=integer(source, fields, "head_dim", hidden // heads),
        rms_norm_eps=number(source, fields, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        max_position_embeddings=integer(source, fields, "max_position_embeddings", 2048),
        tie_word_embeddings=tied or fields.get("tie_word_embeddings") is True,
        rope_scaling=_rope_scaling(source, rope),
    )


def _rope_scaling(source: Path, rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UserError(
            f"{source}: rope type {kind!r} is not supported; use a checkpoint with default, linear "
            f"or llama3 rotary embeddings"
        )
    factor = number(source, rope, "factor")
    if kind == "linear":
        scaling = RopeScaling("linear", factor)
    else:
        scaling = RopeScaling(
            "llama3",
            factor,
            number(source, rope, "low_freq_factor"),
            number(source, rope, "high_freq_factor"),
            integer(source, rope, "original_max_position_embeddings"),
        )
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if not (factor > 0 and 0 < low < high and scaling.original_context > 0):
        raise UserError(
            f"{source}: rope scaling {rope!r} makes no sense; factors must be positive and "
            f"low_freq_factor below high_freq_factor"
        )
    return scaling


def _sampling(generation: dict[str, Any]) -> Sampling:
    """Temperature and top-p of a generation_config.json; they count only where it samples."""
    if generation.get("do_sample") is not True:
        return Sampling()
    values = (generation.get("temperature"), generation.get("top_p"))
    return Sampling(*(float(v) if isinstance(v, int | float) else None for v in values))


def _read_headers(path: Path) -> dict[str, StoredTensor]:
    """All tensors of the directory by name, whether in one file or in several with an index."""
    single, index_file = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    if not index_file.is_file():
        raise UserError(_why_no_weights(path))
    weights = mapping(index_file, read_json(index_file), "weight_map")
    files = {}
    for shard in sorted({str(file) for file in weights.values()}):
        if Path(shard).name != shard:
            raise UserError(f"{index_file}: {shard!r} is not the plain name of a file beside it")
        if not (path / shard).is_file():
            raise UserError(f"{path / shard}: named by the index and missing; fetch it again")
        files[shard] = read_header(path / shard)
    for name, shard in weights.items():
        if name not in files[str(shard)]:
            raise UserError(
                f"{path / str(shard)}: tensor {name!r} is not in it although the index says so; "
                f"fetch the checkpoint again"
            )
    return {name: files[shard][name] for name, shard in weights.items()}


def _why_no_config(path: Path) -> str:
    if (path / "original" / "params.json").is_file():
        return f"{path}: no config.json in it; for Meta's own weights give {path}/original"
    if gguf := sorted(path.glob("*.gguf")):
        return f"{path}: no config.json in it; to use a GGUF file give its path, such as {gguf[0]}"
    return f"{path}: no config.json in it; give a Hugging Face model directory or a .gguf file"


def _why_no_weights(path: Path) -> str:
    if any(path.glob("*.bin")) or any(path.glob("*.pth")):
        return f"{path}: only pickled weights (.bin, .pth), which cptool never loads; {_CONVERT}"
    if any(path.glob("*.safetensors")):
        return f"{path}: model.safetensors.index.json is missing beside its parts; fetch it too"
    return f"{path}: neither model.safetensors nor model.safetensors.index.json in it; fetch them"


def _load_tokenizer(path: Path) -> "Tokenizer | None":
    from cptool.checkpoint.tokenizer import from_tokenizer_json

    if (path / "tokenizer.json").is_file():
        config_file = path / "tokenizer_config.json"
        settings = read_json(config_file) if config_file.is_file() else {}
        template_file = path / "chat_template.jinja"
        template = template_file.read_text("utf-8") if template_file.is_file() else None
        return from_tokenizer_json(path / "tokenizer.json", settings, template)
    if (path / "tokenizer.model").is_file():
        raise UserError(
            f"{path}: a tokenizer.model alone is not supported; write a tokenizer.json with "
            f"transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return None
