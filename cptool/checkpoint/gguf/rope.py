"""Rotary scaling in GGUF files: linear and yarn in the metadata, llama3 and longrope as tensors."""

import math
import struct
from pathlib import Path

from cptool.checkpoint.fields import shown
from cptool.checkpoint.gguf.metadata import Metadata, shortest
from cptool.checkpoint.huggingface.rope_scaling import yarn_attention_factor
from cptool.checkpoint.notes import Notes
from cptool.checkpoint.tensors import StoredTensor
from cptool.errors import UserError
from cptool.model.architectures.family import Family
from cptool.model.config import LlamaConfig, RopeScaling

ROPE_DIVISORS = "rope_freqs.weight"
"""The tensor of one divisor per frequency, which holds Llama 3.1's scaling."""

_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")


def stated_scaling(metadata: Metadata, family: Family, notes: Notes) -> RopeScaling | None:
    """Return the scaling that the metadata states, read as llama.cpp does.

    A factor without a type is linear, the older key counts if the newer one is missing, a factor
    of 0 is none, and type none leaves a factor out, which is added to `notes`.
    """
    path = metadata.path
    newer, older = (
        metadata.number(name) if metadata.has(name) else None
        for name in ("rope.scaling.factor", "rope.scale_linear")
    )
    if newer is not None and older is not None and newer != older:
        raise UserError(
            f"{path}: {metadata.key('rope.scaling.factor')} is {newer} and "
            f"{metadata.key('rope.scale_linear')} {older}; convert the model anew"
        )
    factor = older if newer is None else newer
    key = metadata.key("rope.scaling.type")
    kind = metadata.values.get(key, "linear")
    if factor in (0, 1):
        factor = None
    computed = 1.0 if kind != "yarn" or factor is None else _attention_factor(metadata, factor)
    _check_attention_factors(metadata, family, computed)
    if kind != "yarn" or factor is None:
        _check_queries(metadata, family)
    if kind == "none":
        if factor is not None:
            notes.add(f"{path}: {key} is none, so the factor {factor} beside it does not count")
        return None
    if kind == "longrope":
        return None  # its factors are tensors
    if kind == "yarn":
        return None if factor is None else _yarn(metadata, family, factor)
    if kind != "linear":
        raise UserError(
            f"{path}: rope scaling {shown(kind)} is not supported; use a model without scaling, or "
            f"with linear, yarn, llama3 or longrope scaling"
        )
    return None if factor is None else RopeScaling(kind="linear", factor=factor)


def _check_attention_factors(metadata: Metadata, family: Family, computed: float) -> None:
    """Refuse a factor of cosines and sines other than 1 and what is `computed`: files of yarn state
    the whole factor or what is beside the formula's. A family with longrope has its own.
    """
    own = [] if family.rope_aliases else ["rope.scaling.attn_factor"]
    for name in [*own, "rope.scaling.yarn_attn_factor"]:
        stated = metadata.number(name, 1.0)
        if stated != 1 and not math.isclose(stated, computed, rel_tol=1e-5):
            raise UserError(
                f"{metadata.path}: {metadata.key(name)} is {stated}, and cptool computes with "
                f"{computed} in its place; use a Hugging Face checkpoint of the model"
            )


def _check_queries(metadata: Metadata, family: Family) -> None:
    """Refuse queries that grow with their position without yarn, where cptool computes none."""
    key = "attention.temperature_scale"
    if family.grows_queries and (scale := metadata.number(key, 0.0)):
        raise UserError(
            f"{metadata.path}: {metadata.key(key)} is {scale}, and cptool computes that with yarn "
            f"scaling alone; use a Hugging Face checkpoint of the model"
        )


def context(metadata: Metadata, scaling: RopeScaling | None) -> int:
    """Return the number of positions that the model was made for.

    Linear scaling and yarn stretch the original ones.
    """
    positions = metadata.integer("context_length")
    if scaling is None or not 0 < scaling.factor < 2**31:
        return positions
    original = metadata.integer("rope.scaling.original_context_length", positions)
    return max(positions, int(original * scaling.factor))


def _attention_factor(metadata: Metadata, factor: float) -> float:
    """Return that of yarn by its formula, with the multiplier of the whole if one is stated."""
    multiplier = metadata.number("rope.scaling.yarn_log_multiplier", 0.0)
    whole = yarn_attention_factor(factor, multiplier) if multiplier else 1.0
    return yarn_attention_factor(factor) / whole


def _yarn(metadata: Metadata, family: Family, factor: float) -> RopeScaling:
    """Return yarn as llama.cpp computes it, its attention factor that of the formula."""
    beta = metadata.number("attention.temperature_scale", 0.0) if family.grows_queries else 0.0
    original = "rope.scaling.original_context_length"
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=metadata.integer(original, metadata.integer("context_length")),
        attention_factor=_attention_factor(metadata, factor),
        beta_fast=metadata.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=metadata.number("rope.scaling.yarn_beta_slow", 1.0),
        query_beta=beta or None,
    )


Factors = tuple[tuple[float, ...], tuple[float, ...]]
"""Short and long ones of longrope."""


def take_factors(path: Path, found: dict[str, StoredTensor]) -> Factors | None:
    """Take the factors of longrope out of the tensors `found`; None if there are none."""
    tensors = [found.pop(name, None) for name in _FACTORS]
    if tensors == [None, None]:
        return None
    values = []
    for name, tensor in zip(_FACTORS, tensors, strict=True):
        if tensor is None or len(tensor.shape) != 1 or tensor.encoding != "F32":
            raise UserError(
                f"{path}: {name} must be there and hold one float32 factor per frequency; convert "
                f"the model anew"
            )
        values.append(tuple(map(shortest, _read(tensor))))
    short, long = values
    return short, long


def long_rope(metadata: Metadata, config: LlamaConfig, factors: Factors) -> RopeScaling:
    """Return longrope with these factors; the rest of it is in the metadata."""
    path, original = metadata.path, metadata.integer("rope.scaling.original_context_length")
    if not all(math.isfinite(each) and each > 0 for each in (*factors[0], *factors[1])):
        raise UserError(
            f"{path}: {' or '.join(_FACTORS)} holds a factor that is not positive and finite; "
            f"convert the model anew"
        )
    return RopeScaling(
        kind="longrope",
        factor=config.max_position_embeddings / max(original, 1),
        original_context=original,
        attention_factor=metadata.number("rope.scaling.attn_factor", 1.0),
        short_factors=factors[0],
        long_factors=factors[1],
    )


def _read(tensor: StoredTensor) -> tuple[float, ...]:
    """Return the values of a float32 tensor of one dimension."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        return struct.unpack(f"<{tensor.shape[0]}f", file.read(tensor.nbytes))


def scaling_of_divisors(
    path: Path, config: LlamaConfig, tensor: StoredTensor
) -> RopeScaling | None:
    """Return the llama3 scaling whose divisors are those stored; UserError if none is.

    Converters write divisor = inverse frequency / scaled inverse frequency in float32: 1 for short
    wavelengths, `factor` for long ones. Every published model has the formula's default bands.
    """
    half = config.head_dim // 2
    if tensor.shape != (half,) or tensor.encoding != "F32" or config.rope_scaling is not None:
        raise UserError(
            f"{path}: {ROPE_DIVISORS} has shape {list(tensor.shape)} in {tensor.encoding}; it "
            f"must hold {half} float32 divisors and come without other rope scaling"
        )
    divisors = _read(tensor)
    if all(divisor == 1 for divisor in divisors):
        return None
    if not all(math.isfinite(divisor) and divisor > 0 for divisor in divisors):
        raise UserError(
            f"{path}: {ROPE_DIVISORS} holds a divisor that is not positive and finite; convert "
            f"the model anew"
        )
    scaling = RopeScaling(kind="llama3", factor=shortest(divisors[-1]))
    expected = [
        _llama3_divisor(2 * math.pi * config.rope_theta ** (j / half), scaling) for j in range(half)
    ]
    # Float32 powers in a converter are off by a few ulp times ln(theta), other bands by far more.
    if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(divisors, expected, strict=True)):
        raise UserError(
            f"{path}: the divisors in {ROPE_DIVISORS} are not those of llama3 scaling, the only "
            f"kind supported there; use a Hugging Face checkpoint of the model"
        )
    return scaling


def _llama3_divisor(wavelength: float, scaling: RopeScaling) -> float:
    """By how much llama3 scaling divides the frequency of a wavelength (see `RopeScaling`)."""
    turns = scaling.original_context / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
    return 1 / ((1 - smooth) / scaling.factor + smooth)
