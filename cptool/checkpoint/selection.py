"""Which of the stored tensors make up the model, and whether they are those of its shape."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from cptool.checkpoint.tensor_names import CONVERT
from cptool.checkpoint.tensors import AnyTensor, StoredTensor
from cptool.errors import UserError
from cptool.model.architectures.registry import find_family
from cptool.model.config import LlamaConfig


def select_tensors(
    source: Path,
    config: LlamaConfig,
    found: Mapping[str, AnyTensor],
    encodings: Iterable[str],
) -> dict[str, AnyTensor]:
    """Return the tensors that the model needs out of those `found`, each with the expected shape.

    Raises UserError for a tensor that is missing, misshapen or in an encoding not in `encodings`,
    and for one that its family has not: ignoring a bias or a query norm would change the answer.
    """
    family = find_family(config.family)
    if config.num_hidden_layers > len(found):
        raise UserError(
            f"{source}: {config.num_hidden_layers} layers in the configuration, {len(found)} "
            f"tensors in the files; the two are not of one model"
        )
    needed = family.shapes(config)
    for name, shape in needed.items():
        tensor = found.get(name)
        if tensor is None:
            raise UserError(
                f"{source}: tensor {name} is missing; {_why_missing(name, found, len(needed))}"
            )
        if tensor.shape != shape:
            raise UserError(
                f"{source}: tensor {name} has shape {list(tensor.shape)}, the configuration makes "
                f"it {list(shape)}; the two are not of one model"
            )
        if tensor.encoding not in encodings:
            raise UserError(
                f"{source}: tensor {name} is stored as {tensor.encoding}, which is not supported; "
                f"use one of {', '.join(encodings)}"
            )
    if extra := sorted(found.keys() - needed.keys() - {family.head}):
        raise UserError(
            f"{source}: tensor {extra[0]!r} ({len(extra)} such) belongs to no plain {family.title} "
            f"model, and ignoring it could change the answer; use a checkpoint of the "
            f"{family.title} architecture"
        )
    return {name: found[name] for name in needed}


def split_fused(
    source: Path, config: LlamaConfig, found: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the same tensors, with the matrices that a family's files hold as one each on its own.

    Raises UserError if such a tensor has not as many rows as they have together.
    """
    family, tensors = find_family(config.family), dict(found)
    for fused in family.fused:
        for layer in range(config.num_hidden_layers):
            name = fused.huggingface.format(layer)
            if (whole := tensors.pop(name, None)) is None:
                continue
            parts = [family.find(part, "huggingface") for part in fused.parts]
            rows = [weight.extents(config)[0] for weight, _ in filter(None, parts)]
            if whole.shape[:1] != (sum(rows),):
                raise UserError(
                    f"{source}: tensor {name} has shape {list(whole.shape)}, the configuration "
                    f"makes it {sum(rows)} rows; the two are not of one model"
                )
            size, first = whole.nbytes // sum(rows), 0
            for part, count in zip(fused.parts, rows, strict=True):
                tensors[part.format(layer)] = replace(
                    whole,
                    offset=whole.offset + first * size,
                    nbytes=count * size,
                    shape=(count, *whole.shape[1:]),
                )
                first += count
    return tensors


def flattened(config: LlamaConfig, found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the same tensors, those that files have as [heads, elements of a head] in one
    dimension.
    """
    tensors = dict(found)
    for weight, layer in find_family(config.family).tensors(config):
        if weight.by_head:
            name = weight.huggingface.format(layer)
            tensor, shape = tensors.get(name), (weight.heads(config), config.head_dim)
            if tensor is not None and tensor.shape == shape:
                tensors[name] = replace(tensor, shape=weight.extents(config))
    return tensors


def _why_missing(name: str, found: Iterable[str], count: int) -> str:
    """Return what may be wrong with files that lack a tensor, with the remedy.

    A name with the same parts in the same order and others between them is that of another library
    or of a training run.
    """
    parts = name.removeprefix("model.").split(".")

    def has_them(other: str) -> bool:
        remaining = iter(other.split("."))
        return all(part in remaining for part in parts) and next(remaining, None) is None

    if (other := next(filter(has_them, sorted(found)), None)) is not None:
        return (
            f"the files have it as {other!r:.100}, as another library or a training run wrote it; "
            f"{CONVERT}"
        )
    return (
        f"a model of this shape has {count} tensors, so fetch the checkpoint again or correct "
        f"its configuration"
    )


def mark_interleaved(stored: Mapping[str, AnyTensor], config: LlamaConfig) -> dict[str, AnyTensor]:
    """Return the same tensors, those of rotated rows marked as in interleaved rotary order."""
    marked = dict(stored)
    for weight, layer in find_family(config.family).tensors(config):
        if weight.rotated:
            name = weight.huggingface.format(layer)
            marked[name] = replace(stored[name], interleaved_heads=weight.heads(config))
    return marked


def with_added(stored: Mapping[str, AnyTensor], config: LlamaConfig) -> dict[str, AnyTensor]:
    """Return the same tensors, those of a Hugging Face directory to which the model adds something
    marked with it.
    """
    marked: dict[str, AnyTensor] = dict(stored)
    for weight, layer in find_family(config.family).tensors(config):
        if weight.added:
            name = weight.huggingface.format(layer)
            tensor = stored[name]
            assert isinstance(tensor, StoredTensor)  # safetensors files hold whole tensors
            marked[name] = replace(tensor, added=weight.added)
    return marked
