"""The safetensors files of a directory: one, or several that an index divides the tensors among."""

import re
from pathlib import Path

from cptool.checkpoint.fields import mapping, read_json, shown
from cptool.checkpoint.huggingface.directory import why_no_weights
from cptool.checkpoint.huggingface.safetensors import read_header
from cptool.checkpoint.lookalikes import absent, dangling
from cptool.checkpoint.notes import Notes
from cptool.checkpoint.tensors import StoredTensor
from cptool.errors import UserError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TABLES = re.compile(r"(?:^|\.)rotary_emb\.(?:(?:original_)?inv_freq|(?:cos|sin)_cached)$")


def read_headers(path: Path, optional: str | None, notes: Notes) -> dict[str, StoredTensor]:
    """Return all tensors of the directory by name.

    One file goes before an index, as in transformers, which is added to `notes`. Raises UserError
    if index and files disagree; the index may list a tensor `optional` that is not stored. Tables
    of the rotary embedding, which older files store, are left out: rope_theta says the same.
    """
    found = _read_headers(path, optional, notes)
    return {name: tensor for name, tensor in found.items() if not _is_table(name)}


def _is_table(name: str) -> bool:
    return _TABLES.search(name) is not None


def _read_headers(path: Path, optional: str | None, notes: Notes) -> dict[str, StoredTensor]:
    single, index = path / _SINGLE, path / _INDEX
    for file in (single, index):
        if (why := dangling(file)) is not None:
            raise UserError(f"{file}: {why}")
    if single.is_file():
        if index.is_file():
            notes.add(f"{path}: {_SINGLE} and {_INDEX} are both there; the first one is used")
        return read_header(single)
    if not index.is_file():
        raise UserError(f"{path}: {why_no_weights(path)}")
    return _read_indexed(path, index, optional)


def _read_indexed(path: Path, index: Path, optional: str | None) -> dict[str, StoredTensor]:
    weights = mapping(index, read_json(index), "weight_map")
    if not weights:
        raise UserError(f"{index}: its weight_map names no tensors; fetch the file again")
    for shard in weights.values():
        if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard:
            raise UserError(f"{index}: {shown(shard)} is not the plain name of a file beside it")
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(weights.values())):
        if not (path / shard).is_file():
            why = absent(path / shard)
            remedy = "; fetch it" if why == "missing" else ""
            raise UserError(f"{path / shard}: named by the index and {why}{remedy}")
        tensors = read_header(path / shard)
        for name in tensors:
            if name in found:
                raise UserError(
                    f"{path}: tensor {shown(name)} is both in {found[name].file.name} and in "
                    f"{shard}; remove the file that is not the model's"
                )
            if name not in weights and not _is_table(name):
                raise UserError(
                    f"{path / shard}: tensor {shown(name)} is in it and not in {index.name}; the "
                    f"two are not of one model"
                )
        found |= tensors
    for name, shard in weights.items():
        if name not in found and (name == optional or _is_table(name)):
            continue  # Indexes list the head of tied models too, which is not stored.
        if name not in found:
            raise UserError(
                f"{path / shard}: tensor {shown(name)} is not in it although the index lists it; "
                f"fetch the checkpoint again"
            )
        if found[name].file.name != shard:
            raise UserError(
                f"{index}: tensor {shown(name)} is in {found[name].file.name}, the index says "
                f"{shard}; the two are not of one model"
            )
    return found
