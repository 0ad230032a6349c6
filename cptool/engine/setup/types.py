"""In which types a run stores weights and KV and computes: what was requested, resolved for a
checkpoint, a device and a session. Imports no torch.
"""

import math
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cptool.engine.options import EngineOptions
from cptool.errors import OptionError
from cptool.host import scratch
from cptool.model.architectures.registry import find_family
from cptool.ops.encodings import kept_encodings, row_bytes
from cptool.ops.processor import has_bfloat16_products
from cptool.quantisation import AUTO, FP8_FEED_FORWARD, quantised_to
from cptool.units import size, some

if TYPE_CHECKING:
    from pathlib import Path

    from cptool.checkpoint import Checkpoint
    from cptool.checkpoint.tensors import JoinedTensor, StoredTensor
    from cptool.session.manifest import Manifest

_FLOATS = ("F32", "F16", "BF16")


def resolve_dtype(requested: str, checkpoint: "Checkpoint", device: str) -> str:
    """Return the dtype to compute in: `requested`, or for "auto" the checkpoint's own if `device`
    is fast in it.

    No processor that cptool knows is fast in float16, and those without bfloat16 products take
    several times as long in bfloat16 as in float32, which loses nothing.
    """
    if requested != "auto":
        return requested
    own = checkpoint.matrix_dtype or "float32"
    if device != "cpu":
        return own
    return own if own == "bfloat16" and has_bfloat16_products() else "float32"


def check_kv_dtype(kv_dtype: str, dtype: str, device: str) -> None:
    """Raise OptionError unless attention on `device` can compute in `dtype` over KV of `kv_dtype`:
    it must be the same or, in float32 on a CPU, a narrower one.
    """
    if kv_dtype == dtype:
        return
    if device != "cpu":
        raise OptionError(
            "kv_dtype",
            kv_dtype,
            f"on {device} KV has the type of the products, {dtype}",
            "leave it out, or add `device` cpu",
        )
    if dtype != "float32":
        raise OptionError(
            "kv_dtype",
            kv_dtype,
            f"products in {dtype} take KV in {dtype} alone",
            "leave it out, or compute in `dtype` float32",
        )


def check_kv_memory(kv_memory: int | None, device: str) -> None:
    """Raise OptionError if KV cannot lie in a file: on another device than a CPU, or where files
    are in memory too.
    """
    if kv_memory is None:
        return
    if device != "cpu":
        rule = f"KV lies in a file on a CPU alone, not on {device}"
        raise OptionError("kv_memory", size(kv_memory), rule, "leave it out, or add `device` cpu")
    if scratch.in_memory(folder := tempfile.gettempdir()):
        raise OptionError(
            "kv_memory",
            size(kv_memory),
            f"files in {folder} are in memory too",
            "set TMPDIR to a directory on a disk",
        )


def resolve_types(
    dtype: str, options: EngineOptions, checkpoint: "Checkpoint", device: str
) -> tuple[str, EngineOptions]:
    """Return the dtype to compute in, and the options with the type of KV; either may be requested
    as "auto". Raises OptionError for two that do not go together.
    """
    check_kv_memory(options.kv_memory, device)
    weights = options.weights or "file"
    if weights == AUTO:
        weights = _faster_weights(resolve_dtype(dtype, checkpoint, device), checkpoint, device)
    if weights != "file" and dtype == "auto" and device == "cpu":
        dtype = "float32"
    found = resolve_dtype(dtype, checkpoint, device)
    check_weights(weights, device, checkpoint)
    kv_dtype = found if options.kv_dtype == "auto" else options.kv_dtype
    check_kv_dtype(kv_dtype, found, device)
    return found, replace(options, kv_dtype=kv_dtype, weights=weights)


def _faster_weights(dtype: str, checkpoint: "Checkpoint", device: str) -> str:
    """Return the weights that `--weights auto` stands for."""
    if device != "cpu" or any(t.encoding not in _FLOATS for t in _matrices(checkpoint)):
        return "file"
    from cptool.engine.setup.quantising import chosen

    return chosen(checkpoint, dtype)


def _matrices(checkpoint: "Checkpoint") -> "list[StoredTensor | JoinedTensor]":
    return [tensor for tensor in checkpoint.stored.values() if len(tensor.shape) == 2]


def check_weights(weights: str, device: str, checkpoint: "Checkpoint") -> None:
    """Raise OptionError unless the float matrices of `checkpoint` can be quantised to `weights`."""
    if weights == "file":
        return
    if device != "cpu" and weights != FP8_FEED_FORWARD:
        rule = f"quantised weights are multiplied on a CPU, not on {device}"
        raise OptionError("weights", weights, rule, "leave it out, or add `device` cpu")
    others = {t.encoding for t in _matrices(checkpoint)} - {*_FLOATS}
    if others:
        found = ", ".join(sorted(others))
        rule = f"the weights of {checkpoint.name} are quantised already ({found})"
        raise OptionError("weights", weights, rule, "leave it out: they stay as they are")


def continued_types(
    dtype: str, options: EngineOptions, device: str, *, held: tuple["Path | str", "Manifest"]
) -> tuple[str, EngineOptions]:
    """Return the same to continue a session, its directory and manifest `held`: KV stays in the
    type in which it is, and "auto" computes in the dtype of the last turn.
    """
    check_kv_memory(options.kv_memory, device)
    directory, manifest = held
    kept = manifest.kv_dtype
    if options.kv_dtype not in ("auto", kept):
        raise OptionError(
            "kv_dtype",
            options.kv_dtype,
            f"the KV of {directory} is {kept}",
            "leave `kv_dtype` out, or name a new directory",
        )
    if options.weights not in (None, AUTO, manifest.weights):
        raise OptionError(
            "weights",
            options.weights,
            f"the KV of {directory} is that of weights {manifest.weights}",
            "leave `weights` out, or name a new directory",
        )
    found = manifest.dtype if dtype == "auto" else dtype
    if kept != found and (device != "cpu" or found != "float32"):
        usable = kept if device != "cpu" else f"float32 or {kept}" if kept != "float32" else kept
        remedy = "leave `dtype` out, or name a new directory"
        if dtype == "auto":
            remedy = f"add `device` cpu, or continue it with prefill and `dtype` {kept}"
        raise OptionError(
            "dtype",
            found,
            f"the KV of {directory} is {kept}, over which {device} computes in {usable}",
            remedy,
        )
    if manifest.weights not in ("file", FP8_FEED_FORWARD) and device != "cpu":
        raise OptionError(
            "device",
            device,
            f"{directory} has weights {manifest.weights}, which are multiplied on a CPU",
            "add `device` cpu",
        )
    return found, replace(options, kv_dtype=kept, weights=manifest.weights)


def widened(checkpoint: "Checkpoint", dtype: str, device: str) -> str | None:
    """Return which quantised matrices do not stay as the file stores them, in words; None if there
    are none.
    """
    kept = kept_encodings(dtype == "float32") if device == "cpu" else frozenset()
    found = [
        tensor
        for tensor in checkpoint.stored.values()
        if len(tensor.shape) == 2 and tensor.encoding not in (*kept, *_FLOATS)
    ]
    if not found:
        return None
    types = ", ".join(sorted({tensor.encoding for tensor in found}))
    stored = sum(tensor.nbytes for tensor in found)
    held = sum(math.prod(tensor.shape) for tensor in found) * (4 if dtype == "float32" else 2)
    how = "widened to float32, without loss" if dtype == "float32" else f"rounded to {dtype}"
    bytes_of = f"{size(stored)} in the file, {size(held)} in memory"
    return f"{some(len(found), 'tensor')} in {types} {how}: {bytes_of}"


def setup_types(
    dtype: str,
    options: EngineOptions,
    checkpoint: "Checkpoint",
    device: str,
    *,
    held: tuple["Path | str | None", "Manifest | None"] = (None, None),
) -> dict[str, Any]:
    """Return the fields of a `Setup` that say what is computed and stored in which type: for the
    session `held`, its directory and manifest, or without a manifest for a new one.
    """
    directory, manifest = held
    if directory is None or manifest is None:
        dtype, options = resolve_types(dtype, options, checkpoint, device)
    else:
        dtype, options = continued_types(dtype, options, device, held=(directory, manifest))
    return {"dtype": dtype, "options": options}


def mean_weight_size(
    checkpoint: "Checkpoint", dtype: str, device: str, weights: str | None = None
) -> float | None:
    """Return the bytes per element of the matrices of a model that computes in `dtype` on `device`;
    None where every weight has that dtype. weights: those of `EngineOptions`.

    On a CPU, products read matrices as they are stored (`cptool.ops.stored`).
    """
    to, kept = quantised_to(weights), kept_encodings(dtype == "float32")
    if device != "cpu":
        if to is None:
            return None
        kept = frozenset()  # everything else is widened
    held, plain, count = 0, True, 0
    for name, tensor in checkpoint.stored.items():
        if len(tensor.shape) != 2:
            continue
        elements = math.prod(tensor.shape)
        row = None if to is None else row_bytes(to[0], tensor.shape[1])
        if to is not None and row is not None and _kind(checkpoint, name) in to[1]:
            size, plain = tensor.shape[0] * row, False
        elif tensor.encoding in kept:
            size, plain = tensor.nbytes, False
        else:
            size = (4 if dtype == "float32" else 2) * elements
        held, count = held + size, count + elements
    return None if plain else held / count


def _kind(checkpoint: "Checkpoint", name: str) -> str:
    """Return which of `cptool.quantisation.KINDS` a tensor is a part of."""
    found = find_family(checkpoint.config.family).find(name, "huggingface")
    return "" if found is None else found[0].parameter.split(".")[-2]
