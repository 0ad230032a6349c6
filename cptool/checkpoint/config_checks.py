"""Which numbers a model's configuration may have, whatever file states them."""

from dataclasses import fields
from pathlib import Path

from cptool.checkpoint.layers import MOST_LAYERS
from cptool.errors import UserError
from cptool.model.config import LlamaConfig, RopeScaling

_MAX_HEAD_DIM = 256  # of attention, which takes even ones (`cptool.ops.checks`)

# Far beyond any model, and small enough that no product of them overflows 64 bits.
_MAX_SIZE = 2**24
_LIMITS = {"num_hidden_layers": MOST_LAYERS, "max_position_embeddings": 2**31 - 1}

# The range of normal float32 numbers, in which the model computes with them.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127


def check_config(source: Path, config: LlamaConfig) -> LlamaConfig:
    """Return the same configuration; raise UserError if cptool cannot compute such a model."""
    for name in (entry.name for entry in fields(config)):
        value, limit = getattr(config, name), _LIMITS.get(name, _MAX_SIZE)
        if type(value) is int and not 0 < value <= limit:
            raise UserError(
                f"{source}: {name} is {value}, it must be positive and at most {limit}; correct "
                f"the file"
            )
        if type(value) is float:
            _check_number(source, name, value)
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"{source}: {config.num_attention_heads} query heads on {config.num_key_value_heads} "
            f"key/value heads; the first must be a multiple of the second"
        )
    if config.head_dim % 2 or config.head_dim > _MAX_HEAD_DIM:
        raise UserError(
            f"{source}: head_dim is {config.head_dim}, attention takes even ones up to "
            f"{_MAX_HEAD_DIM}; use another model"
        )
    if (config.rotary_dim or 2) % 2:
        raise UserError(
            f"{source}: {config.rotary_dim} elements of a head are rotated, which are no pairs; "
            f"correct the file"
        )
    if (scaling := config.rope_scaling) is not None:
        _check_scaling(source, config, scaling)
    return config


def _check_scaling(source: Path, config: LlamaConfig, scaling: RopeScaling) -> None:
    numbers = (value for value in vars(scaling).values() if type(value) is float)
    for value in (*numbers, float(scaling.original_context)):
        _check_number(source, "a number of the rope scaling", value)
    if not scaling.low_freq_factor < scaling.high_freq_factor:
        raise UserError(
            f"{source}: rope scaling with low_freq_factor {scaling.low_freq_factor} and "
            f"high_freq_factor {scaling.high_freq_factor} makes no sense; the first must be "
            f"below the second"
        )
    pairs = (config.rotary_dim or config.head_dim) // 2
    for name, factors in (("short", scaling.short_factors), ("long", scaling.long_factors)):
        if scaling.kind == "longrope" and len(factors) != pairs:
            raise UserError(
                f"{source}: {len(factors)} {name} factors of the rope scaling for {pairs} rotated "
                f"pairs of a head; the two must be as many"
            )


def _check_number(source: Path, name: str, value: float) -> None:
    if not _SMALLEST <= value <= _LARGEST:
        raise UserError(
            f"{source}: {name} is {value}, it must be positive and within the range of float32; "
            f"correct the file"
        )
