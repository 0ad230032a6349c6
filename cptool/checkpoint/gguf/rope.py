"""Rotary scaling in GGUF files: linear in the metadata, llama3 as a tensor of divisors."""

import math
import struct
from pathlib import Path

from cptool.checkpoint.fields import shown
from cptool.checkpoint.gguf.metadata import Metadata, shortest
from cptool.checkpoint.notes import Notes
from cptool.checkpoint.tensors import StoredTensor
from cptool.errors import UserError
from cptool.model.config import LlamaConfig, RopeScaling

ROPE_DIVISORS = "rope_freqs.weight"
"""The tensor of one divisor per frequency, which holds Llama 3.1's scaling."""


def linear_scaling(metadata: Metadata, notes: Notes) -> RopeScaling | None:
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
    if kind == "none":
        if factor not in (None, 0, 1):
            notes.add(f"{path}: {key} is none, so the factor {factor} beside it does not count")
        return None
    if kind != "linear":
        raise UserError(
            f"{path}: rope scaling {shown(kind)} is not supported; use a model without scaling, or "
            f"with linear or llama3 scaling"
        )
    return RopeScaling(kind="linear", factor=factor) if factor not in (None, 0, 1) else None


def context(metadata: Metadata, scaling: RopeScaling | None) -> int:
    """Return the number of positions that the model was made for.

    Linear scaling stretches the original ones.
    """
    positions = metadata.integer("context_length")
    if scaling is None or not 0 < scaling.factor < 2**31:
        return positions
    original = metadata.integer("rope.scaling.original_context_length", positions)
    return max(positions, int(original * scaling.factor))


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
    with path.open("rb") as file:
        file.seek(tensor.offset)
        divisors = struct.unpack(f"<{half}f", file.read(tensor.nbytes))
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
