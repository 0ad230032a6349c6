"""The shape of a model out of the header of a GGUF file."""

from dataclasses import replace
from typing import Any

from cptool.checkpoint.gguf.metadata import Metadata
from cptool.checkpoint.gguf.rope import context, stated_scaling
from cptool.checkpoint.image_ids import find_image_ids
from cptool.checkpoint.layers import read_windows, unrotated_layers
from cptool.checkpoint.notes import Notes
from cptool.checkpoint.tensors import StoredTensor
from cptool.errors import UserError
from cptool.model.architectures.family import EMBEDDING, HEAD, Family
from cptool.model.config import LlamaConfig


def read_config(
    metadata: Metadata, tensors: dict[str, StoredTensor], family: Family, notes: Notes
) -> LlamaConfig:
    """Return the model's shape, without scaling that is a tensor; it has not passed `check_config`.

    Fields that do not count are added to `notes`.
    """
    path = metadata.path
    name = family.weight(EMBEDDING).gguf
    embedding = tensors.get(name)
    if embedding is None:
        what = "only a vocabulary" if not tensors else "not a whole model"
        raise UserError(
            f"{path}: tensor {name} is missing, so it is {what}; give the GGUF of the model itself"
        )
    hidden = metadata.integer("embedding_length")
    heads = metadata.integer("attention.head_count")
    head_dim = metadata.integer("attention.key_length", hidden // heads if heads else 0)
    rotated = metadata.integer("rope.dimension_count", head_dim)
    whole = ("attention.value_length", *["rope.dimension_count"] * (not family.partial_rotary))
    for key in whole:
        if (value := metadata.integer(key, head_dim)) != head_dim:
            raise UserError(
                f"{path}: {metadata.key(key)} is {value}, cptool needs it to equal the head size "
                f"{head_dim}; use another model"
            )
    vocabulary = embedding.shape[0]
    if (stated := metadata.integer("vocab_size", vocabulary)) != vocabulary:
        raise UserError(
            f"{path}: {metadata.key('vocab_size')} is {stated}, and {name} has {vocabulary} "
            f"rows; the two are not of one model"
        )
    scaling = stated_scaling(metadata, family, notes)
    layers, positions = metadata.integer("block_count"), context(metadata, scaling)
    switches = _switches(metadata, family, layers)
    if family.window_theta is not None:  # scaling is a part of the model
        positions = metadata.integer("context_length")
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=metadata.integer("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=metadata.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=metadata.number("attention.layer_norm_rms_epsilon"),
        rope_theta=metadata.number("rope.freq_base", 10000.0),
        rotary_dim=None if rotated == head_dim else rotated,
        max_position_embeddings=positions,
        tie_word_embeddings=family.weight(HEAD).gguf not in tensors,
        rope_scaling=scaling,
        image_ids=_image_ids(metadata, family, vocabulary),
        family=family.name,
        **switches,
    )
    flags: dict[str, Any] = {
        name: metadata.flag(name) if metadata.has(name) else _has(tensors, family, config, name)
        for name in family.flags
    }
    config = replace(config, **flags)
    if family.gguf_scale is None:
        return config
    return replace(config, score_scale=family.gguf_scale(config))


def _switches(metadata: Metadata, family: Family, layers: int) -> dict[str, Any]:
    """Return the fields of the configuration that a plain Llama leaves at their defaults."""
    found: dict[str, Any] = {}
    for entry in family.numbers:
        if entry.gguf is not None and (entry.gguf_default or metadata.has(entry.gguf)):
            value = metadata.number(entry.gguf, entry.gguf_default)
            if value:  # 0 switches off
                found[entry.field] = value
    if family.window_theta is not None:
        theta = family.window_theta
        if theta == family.default_theta:
            theta = metadata.number("rope.freq_base", theta)  # one for all layers
        found["window_rope_theta"] = metadata.number("rope.freq_base_swa", theta)
    fields = dict(family.defaults)
    if family.is_windowed is not None:
        fields |= window_fields(metadata, family)
    found["windows"] = read_windows(metadata.path, fields, family, layers)
    found["unrotated_layers"] = unrotated_layers(metadata.path, {}, family, layers)
    return found


def window_fields(metadata: Metadata, family: Family) -> dict[str, Any]:
    """Return the fields of a config.json that say which layers have a window, and which one."""
    window = metadata.integer("attention.sliding_window", family.gguf_window)
    fields: dict[str, Any] = {"sliding_window": window}
    pattern = metadata.values.get(metadata.key("attention.sliding_window_pattern"))
    if isinstance(pattern, list):
        kinds = {True: "sliding_attention", False: "full_attention"}
        fields["layer_types"] = [kinds.get(windowed) for windowed in pattern]
    elif pattern is not None:
        fields["sliding_window_pattern"] = pattern
    return fields


def _image_ids(metadata: Metadata, family: Family, size: int) -> tuple[tuple[int, int], ...]:
    if family.image_tokens is None:
        return ()
    field = "tokenizer.ggml.tokens"
    tokens = metadata.values.get(field)
    names = {name: i for i, name in enumerate(tokens if isinstance(tokens, list) else [])}
    return find_image_ids(metadata.path, field, names, family=family, vocab_size=size)


def _has(tensors: dict[str, StoredTensor], family: Family, config: LlamaConfig, flag: str) -> bool:
    """Return whether the files hold tensors that a model has because `flag` is set."""
    switched_on: dict[str, Any] = {flag: True}
    other = replace(config, **switched_on)
    return any(
        weight.needed(other) and not weight.needed(config) and weight.gguf.format(0) in tensors
        for weight in family.weights
    )
