"""Checkpoints in the Hugging Face layout: config.json next to safetensors files.

Where files say a thing twice, both are read: equal answers go on, others are refused by both
names, or transformers' choice is taken and noted.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptool.checkpoint.base import (
    EMBEDDING,
    HEAD,
    TORCH_DTYPES,
    Checkpoint,
    Sampling,
    StoredTensor,
    check_config,
    differ,
    select_tensors,
    token_ids,
)
from cptool.checkpoint.fields import flag, integer, mapping, number, read_json, shown
from cptool.checkpoint.kinds import check_kind, check_names, check_quantization
from cptool.checkpoint.known_fields import (
    GENERATION,
    HUGGING_FACE,
    ROPE,
    TOKENIZER,
    FieldList,
    check_fields,
    note_of_unknown,
)
from cptool.checkpoint.lookalikes import dangling
from cptool.checkpoint.shards import read_headers
from cptool.errors import UserError
from cptool.model.config import LlamaConfig, RopeScaling

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer import Tokenizer

# transformers' defaults of a Llama whose files do not name it.
_DEFAULT_EOS = 2

_LINEAR, _LLAMA3 = "linear", "llama3"

# How long a context the author states beside `max_position_embeddings`.
_CONTEXT_HINTS = ("max_sequence_length", "model_max_length", "max_seq_len", "max_seq_length")


def open_huggingface(path: Path, name: str | None = None) -> Checkpoint:
    """Opens and validates the directory `path`.

    UserError for anything that is missing, damaged or not a plain Llama.
    """
    check_kind(path)
    config_file = path / "config.json"
    fields = read_json(config_file)
    _check_architecture(config_file, fields)  # first: others have fields that no Llama has
    unknown = check_fields(config_file, fields, HUGGING_FACE)
    check_quantization(path, fields)
    tied = flag(config_file, fields, "tie_word_embeddings")
    found, notes = read_headers(path, tied)
    check_names(path, found)
    found = _with_prefix(found)
    if not tied and HEAD not in found and EMBEDDING in found:
        raise UserError(
            f"{path}: {HEAD} is missing, as in embedding models, and {config_file.name} does not "
            f'say that the embedding serves in its place; set "tie_word_embeddings" to true '
            f"there if it does, or use a LlamaForCausalLM checkpoint"
        )
    config = read_config(config_file, fields, notes)
    config = check_config(config_file, replace(config, tie_word_embeddings=HEAD not in found))
    stored = select_tensors(path, config, found, TORCH_DTYPES)
    if tied and HEAD in found and differ(found[HEAD], found[EMBEDDING]):
        notes.append(
            f"{config_file}: tie_word_embeddings is true, and the files hold a {HEAD} that differs "
            f"from the embedding; the files' own is used"
        )
    generation = _read_optional(path / "generation_config.json", GENERATION, unknown)
    tokenizer = _read_optional(path / "tokenizer_config.json", TOKENIZER, unknown)
    return Checkpoint(
        path=path,
        name=name or path.resolve().name,
        config=config,
        stored=stored,
        eos_ids=_end_ids(path, fields, generation, tokenizer, config),
        bos_id=_begin_id(path, fields, generation, config),
        sampling=_sampling(path / "generation_config.json", generation),
        notes=(*notes, *note_of_unknown(unknown)),
        load_tokenizer=lambda: _load_tokenizer(path),
    )


def _with_prefix(found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors under the names of a LlamaForCausalLM: those of a bare LlamaModel lack a prefix,
    which transformers adds when it reads them.
    """
    if any(name.startswith("model.") for name in found):
        return found
    bare = re.compile(r"(?:embed_tokens|layers\.\d+|norm)\.")
    return {f"model.{name}" if bare.match(name) else name: found[name] for name in found}


def read_shape(source: Path, notes: list[str]) -> LlamaConfig:
    """The checked shape of a model out of its `config.json` alone.

    `notes` takes a line for every choice between two answers and for fields that are ignored.
    """
    fields = read_json(source)
    _check_architecture(source, fields)
    unknown = check_fields(source, fields, HUGGING_FACE)
    config = check_config(source, read_config(source, fields, notes))
    notes += note_of_unknown(unknown)
    return config


def read_config(source: Path, fields: dict[str, Any], notes: list[str]) -> LlamaConfig:
    """The model's shape out of the fields of a `config.json`, of transformers 4 or 5.

    `notes` takes a line for every choice between two answers. The fields have passed
    `_check_architecture` and `check_fields`; the result has not passed `check_config`.
    """
    _check_layers(source, fields)
    _check_window(source, fields)
    heads = integer(source, fields, "num_attention_heads")
    hidden = integer(source, fields, "hidden_size")
    if heads < 1 or hidden < 1 or (fields.get("head_dim") is None and hidden % heads):
        raise UserError(
            f"{source}: hidden_size {hidden} does not divide into {heads} heads; it must, or "
            f"head_dim must be given"
        )
    head_dim = integer(source, fields, "head_dim", hidden // heads)
    _check_attention_scale(source, fields, head_dim)
    positions = integer(source, fields, "max_position_embeddings", 2048)
    theta, scaling, original = _read_rope(source, fields, positions, notes)
    return LlamaConfig(
        vocab_size=integer(source, fields, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer(source, fields, "intermediate_size"),
        num_hidden_layers=integer(source, fields, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=integer(source, fields, "num_key_value_heads", heads),
        head_dim=head_dim,
        rms_norm_eps=number(source, fields, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        max_position_embeddings=_context(fields, positions, scaling, original),
        tie_word_embeddings=flag(source, fields, "tie_word_embeddings"),
        rope_scaling=scaling,
    )


def _check_architecture(source: Path, fields: dict[str, Any]) -> None:
    architectures = fields.get("architectures") or ["LlamaForCausalLM"]
    kind = fields.get("model_type", "llama")
    # The second spelling is that of the first converted checkpoints.
    if architectures in (["LlamaForCausalLM"], ["LLaMAForCausalLM"]) and kind == "llama":
        return
    first = architectures[0] if isinstance(architectures, list) else architectures
    why = {
        "LlamaModel": "it has no output matrix, as embedding models do not",
        "LlamaForSequenceClassification": "it scores texts, as reward models do",
        "LlamaForTokenClassification": "it labels tokens",
        "LlamaForQuestionAnswering": "it marks answers in a text",
    }.get(first if isinstance(first, str) else "", "")
    raise UserError(
        f"{source}: architecture {shown(architectures)} of type {shown(kind)} is not "
        f"supported{why and f' ({why})'}; use a LlamaForCausalLM checkpoint"
    )


def _check_layers(source: Path, fields: dict[str, Any]) -> None:
    """Refuses layers of different kinds, of which newer configurations have a list."""
    kinds = fields.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    ):
        raise UserError(
            f"{source}: layer_types is {shown(kinds)}, cptool computes layers of full attention "
            f"alone; use another checkpoint"
        )


def _check_window(source: Path, fields: dict[str, Any]) -> None:
    """Refuses a window of attention, unless the file says that it is not used, as Qwen's do."""
    window = fields.get("sliding_window")
    if window not in (None, 0) and fields.get("use_sliding_window") is not False:
        raise UserError(
            f"{source}: sliding_window is {shown(window)}, and cptool computes attention to the "
            f"whole context; use a checkpoint without it"
        )


def _check_attention_scale(source: Path, fields: dict[str, Any], head_dim: int) -> None:
    """Refuses scores that are multiplied by anything but the inverse root of the head size."""
    usual = {"attention_multiplier": head_dim**-0.5 if head_dim > 0 else 0.0}
    for key, expected in {**usual, "query_pre_attn_scalar": float(head_dim)}.items():
        if fields.get(key) is not None:
            value = number(source, fields, key)
            if not math.isclose(value, expected, rel_tol=1e-6):
                raise UserError(
                    f"{source}: {key} is {value}, cptool scales attention as a Llama does, where "
                    f"it would be {expected}; use a checkpoint without it"
                )


def _read_rope(
    source: Path, fields: dict[str, Any], positions: int, notes: list[str]
) -> tuple[float, RopeScaling | None, int | None]:
    """Base and scaling of the rotary embedding, and the context before scaling where it is stated.

    transformers 4 has `rope_theta` and `rope_scaling`, 5 has both in `rope_parameters`, and files
    exist with all three. They must agree, for transformers' own choice depends on its version.
    """
    older, newer = (mapping(source, fields, key) for key in ("rope_scaling", "rope_parameters"))
    answers = [
        _rope_of(source, key, rope, fields, positions, notes)
        for key, rope in (("rope_scaling", older), ("rope_parameters", newer))
        if rope
    ]
    if len(answers) == 2 and answers[0] != answers[1]:
        raise UserError(
            f"{source}: rope_scaling {shown(older)} and rope_parameters {shown(newer)} say "
            f"different things; remove the wrong one"
        )
    if answers:
        return answers[0]
    return number(source, fields, "rope_theta", 10000.0), None, None


def _rope_of(
    source: Path,
    place: str,
    rope: dict[str, Any],
    fields: dict[str, Any],
    positions: int,
    notes: list[str],
) -> tuple[float, RopeScaling | None, int | None]:
    """The same out of one of the two dictionaries; what it lacks is at the top level."""
    theta = number(source, fields, "rope_theta", 10000.0)
    if rope.get("rope_theta") is not None:
        inside = number(source, rope, "rope_theta")
        if fields.get("rope_theta") is not None and inside != theta:
            raise UserError(
                f"{source}: rope_theta is {theta}, and {inside} inside {place}; remove the wrong "
                f"one"
            )
        theta = inside
    kinds = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise UserError(
            f"{source}: {place} has rope_type {shown(kinds[0])} and type {shown(kinds[1])}; remove "
            f"the wrong one"
        )
    kind = kinds[0] if kinds else "default"
    if kind not in ("default", _LINEAR, _LLAMA3):
        raise UserError(
            f"{source}: rope type {shown(kind)} is not supported; use a checkpoint with default, "
            f"linear or llama3 rotary embeddings"
        )
    check_fields(source, rope, ROPE)
    if kind == "default":
        if rope.get("factor") is not None and number(source, rope, "factor") != 1:
            raise UserError(
                f"{source}: {place} has a factor of {number(source, rope, 'factor')} and no type "
                f'that it belongs to; add "rope_type"'
            )
        return theta, None, None
    original = _original_context(source, place, rope, fields, notes)
    factor = number(source, rope, "factor")
    if kind == _LINEAR:
        return theta, RopeScaling(_LINEAR, factor), original
    low, high = (number(source, rope, key) for key in ("low_freq_factor", "high_freq_factor"))
    # As transformers does where nothing states it.
    before = positions if original is None else original
    return theta, RopeScaling(_LLAMA3, factor, low, high, before), original


def _original_context(
    source: Path, place: str, rope: dict[str, Any], fields: dict[str, Any], notes: list[str]
) -> int | None:
    key = "original_max_position_embeddings"
    inside, top = (
        None if where.get(key) is None else integer(source, where, key) for where in (rope, fields)
    )
    if inside is not None and top is not None and inside != top:
        note = f"{source}: {key} is {top}, and {inside} inside {place}; the first one counts"
        if note not in notes:
            notes.append(note)
    return inside if top is None else top


def _context(
    fields: dict[str, Any], positions: int, scaling: RopeScaling | None, original: int | None
) -> int:
    """How many positions the model was made for.

    Linear scaling stretches the context that the model had before. `max_position_embeddings` is
    that one, unless the file states it apart, or says a second time how long the context is now.
    """
    if scaling is None or scaling.kind != _LINEAR or not 0 < scaling.factor < 2**31:
        return positions
    if original is not None:
        return max(positions, int(original * scaling.factor))
    if any(fields.get(key) == positions for key in _CONTEXT_HINTS):
        return positions
    return max(positions, int(positions * scaling.factor))


def _read_optional(file: Path, known: FieldList, unknown: list[str]) -> dict[str, Any]:
    """The fields of a file that may be missing; adds what is not known to `unknown`."""
    if not file.is_file():
        if (why := dangling(file)) is not None:
            raise UserError(f"{file}: {why}")
        return {}
    fields = read_json(file)
    unknown += check_fields(file, fields, known)
    return fields


def _end_ids(
    path: Path,
    fields: dict[str, Any],
    generation: dict[str, Any],
    tokenizer: dict[str, Any],
    config: LlamaConfig,
) -> tuple[int, ...]:
    """Every token that a file says ends an answer; the generation's come first."""
    ids = [
        found
        for file, source in (("generation_config.json", generation), ("config.json", fields))
        for found in token_ids(
            path / file, "eos_token_id", source.get("eos_token_id"), config.vocab_size
        )
    ]
    named = "eos_token_id" in fields or "eos_token_id" in generation or tokenizer.get("eos_token")
    if not named and config.vocab_size > _DEFAULT_EOS:
        ids = [_DEFAULT_EOS]
    return tuple(dict.fromkeys(ids))


def _begin_id(
    path: Path, fields: dict[str, Any], generation: dict[str, Any], config: LlamaConfig
) -> int | None:
    for file, source in (("generation_config.json", generation), ("config.json", fields)):
        ids = token_ids(path / file, "bos_token_id", source.get("bos_token_id"), config.vocab_size)
        if ids:
            return ids[0]
    return None


def _sampling(source: Path, generation: dict[str, Any]) -> Sampling:
    """Temperature and top-p of a generation_config.json; they count only where it samples."""
    values = {
        key: number(source, generation, key)
        for key in ("temperature", "top_p")
        if generation.get(key) is not None
    }
    if not flag(source, generation, "do_sample"):
        return Sampling()
    return Sampling(values.get("temperature"), values.get("top_p"))


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
