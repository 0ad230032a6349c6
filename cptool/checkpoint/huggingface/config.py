"""The shape of a model out of its `config.json`."""

import math
from pathlib import Path
from typing import Any

from cptool.checkpoint.config_checks import check_config
from cptool.checkpoint.fields import flag, integer, mapping, number, read_json, shown
from cptool.checkpoint.huggingface.known import HUGGING_FACE
from cptool.checkpoint.huggingface.rope import context, read_rope
from cptool.checkpoint.image_ids import find_image_ids
from cptool.checkpoint.known_fields import check_fields
from cptool.checkpoint.layers import read_windows, unrotated_layers
from cptool.checkpoint.notes import Notes
from cptool.checkpoint.other_models import kind_of
from cptool.errors import UserError
from cptool.model.architectures.family import Family
from cptool.model.architectures.registry import families
from cptool.model.config import LlamaConfig

# What else a class of transformers does with a model, by the end of its name.
_OTHER_USES = {
    "Model": "it has no output matrix, as embedding models do not",
    "ForSequenceClassification": "it scores texts, as reward models do",
    "ForTokenClassification": "it labels tokens",
    "ForQuestionAnswering": "it marks answers in a text",
}


def read_shape(source: Path, notes: list[str]) -> LlamaConfig:
    """Return the checked shape of a model out of its `config.json` alone.

    Lines about choices between two answers and about ignored fields are appended to `notes`.
    """
    noted = Notes()
    fields = read_checked_fields(source, noted)
    config = check_config(source, read_config(source, fields, noted))
    notes += noted.lines()
    return config


def read_checked_fields(source: Path, notes: Notes) -> dict[str, Any]:
    """Return the fields of a `config.json`; UserError if one means what cptool does not compute.

    Fields that are ignored are added to `notes`.
    """
    fields = read_json(source)
    family = family_of(source, fields)  # first: others have fields that no known family has
    used = [*(entry.huggingface for entry in family.numbers), *family.flags, *family.used_fields]
    used += ["partial_rotary_factor"] * family.partial_rotary
    used += ["use_sliding_window"] * (family.is_windowed is not None)
    check_fields(source, fields, HUGGING_FACE.of_family(family.neutral_fields, used), notes)
    return fields


def read_config(source: Path, fields: dict[str, Any], notes: Notes) -> LlamaConfig:
    """Return the model's shape out of the fields of a `config.json`, of transformers 4 or 5.

    The fields are those of `read_checked_fields`; the result has not passed `check_config`. Choices
    between two answers are added to `notes`.
    """
    family = family_of(source, fields)
    fields = {**family.defaults, **fields}
    heads = integer(source, fields, "num_attention_heads")
    hidden = integer(source, fields, "hidden_size")
    if heads < 1 or hidden < 1 or (fields.get("head_dim") is None and hidden % heads):
        raise UserError(
            f"{source}: hidden_size {hidden} does not divide into {heads} heads; it must, or "
            f"head_dim must be given"
        )
    head_dim = integer(source, fields, "head_dim", hidden // heads)
    _check_attention_scale(source, fields, family, head_dim)
    default = family.defaults.get("max_position_embeddings")
    positions = integer(source, fields, "max_position_embeddings", default)
    layers = integer(source, fields, "num_hidden_layers")
    rope = read_rope(source, fields, family, positions=positions, notes=notes)
    if (scaling := rope.scaling) is not None and scaling.kind == "longrope":
        notes.add(
            f"{source}: rotary scaling has factors for long and for short contexts; the long ones "
            f"serve all texts unless `context_length` is at most {scaling.original_context}"
        )
    if family.window_theta is None:  # else scaling is a part of the model
        positions = context(fields, positions, rope)
    default_eps = family.defaults.get("rms_norm_eps")
    switches: dict[str, Any] = {name: flag(source, fields, name) for name in family.flags}
    for entry in family.numbers:
        if fields.get(entry.huggingface, entry.default) is not None:
            value = number(source, fields, entry.huggingface, entry.default)
            switches[entry.field] = entry.converted(value)
    return LlamaConfig(
        vocab_size=integer(source, fields, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer(source, fields, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=integer(source, fields, "num_key_value_heads", heads),
        head_dim=head_dim,
        rms_norm_eps=number(source, fields, "rms_norm_eps", default_eps),
        rope_theta=rope.theta,
        max_position_embeddings=positions,
        tie_word_embeddings=flag(source, fields, "tie_word_embeddings"),
        rope_scaling=rope.scaling,
        window_rope_theta=rope.window_theta,
        windows=read_windows(source, fields, family, layers),
        rotary_dim=None if rope.part == 1 else int(head_dim * rope.part),
        unrotated_layers=unrotated_layers(source, fields, family, layers),
        image_ids=_image_ids(source, fields, family),
        family=family.name,
        **switches,
    )


def _image_ids(source: Path, fields: dict[str, Any], family: Family) -> tuple[tuple[int, int], ...]:
    if family.image_tokens is None:
        return ()
    field, vocab_size = "vocabulary_map", integer(source, fields, "vocab_size")
    names = mapping(source, fields, field)
    return find_image_ids(source, field, names, family=family, vocab_size=vocab_size)


def family_of(source: Path, fields: dict[str, Any]) -> Family:
    """Return the model family that a `config.json` names; UserError if there is no such family.

    Llama is what a file without names means.
    """
    architectures = fields.get("architectures") or ["LlamaForCausalLM"]
    kind = fields.get("model_type", "llama")
    known = families()
    for family in known:
        named = [[name] for name in family.architectures]
        if kind == family.model_type and (
            not fields.get("architectures") or architectures in named
        ):
            return family
    first = architectures[0] if isinstance(architectures, list) else architectures
    stems = [family.architectures[0].removesuffix("ForCausalLM") for family in known]
    uses = {stem + end: why for stem in stems for end, why in _OTHER_USES.items()}
    why = uses.get(first if isinstance(first, str) else "", "") or kind_of(kind)
    raise UserError(
        f"{source}: architecture {shown(architectures)} of type {shown(kind)} is not "
        f"supported{why and f' ({why})'}; use one of those that `cptool models` lists"
    )


def _check_attention_scale(
    source: Path, fields: dict[str, Any], family: Family, head_dim: int
) -> None:
    """Refuse scores that are scaled by anything but the inverse root of the head size."""
    usual = {"attention_multiplier": head_dim**-0.5 if head_dim > 0 else 0.0}
    read = {entry.huggingface for entry in family.numbers}
    for key, expected in {**usual, "query_pre_attn_scalar": float(head_dim)}.items():
        if key not in read and fields.get(key) is not None:
            value = number(source, fields, key)
            if not math.isclose(value, expected, rel_tol=1e-6):
                raise UserError(
                    f"{source}: {key} is {value}, cptool scales attention as a Llama does, where "
                    f"it would be {expected}; use a checkpoint without it"
                )
