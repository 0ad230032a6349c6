"""Models in several GGUF files, as llama.cpp's gguf-split divides large ones.

The files are NAME-00001-of-0000N.gguf. Each has a header for the tensors in it, with its number
from 0 (`split.no`), the number of files (`split.count`) and the number of tensors in all of them
(`split.tensors.count`). The metadata of the model is in the first one.
"""

import re
from glob import escape
from pathlib import Path
from typing import Any

from cptool.checkpoint.fields import readable, shown
from cptool.checkpoint.gguf.header import Header, read_header
from cptool.checkpoint.lookalikes import absent
from cptool.checkpoint.tensors import StoredTensor
from cptool.errors import UserError

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_COUNT, _NUMBER, _TENSORS = "split.count", "split.no", "split.tensors.count"

_MOST_PARTS = 2**16  # the number is of 16 bits

# What a header says of its own file, and not of the model.
_OF_A_FILE = (_NUMBER, "general.alignment")


def read_model(path: Path) -> tuple[Path, Header]:
    """Return the first file of the model that `path` is a part of, and the metadata and tensors of
    all of them; a file that is not split is the model itself.

    Raises UserError if a part is missing, in another's place, or of another model.
    """
    header = read_header(path)
    if header.metadata.get(_COUNT, 1) in (0, 1):
        return path, header
    files = _all_files(path, header.metadata)
    metadata: dict[str, Any] = {}
    tensors: dict[str, StoredTensor] = {}
    for part, file in enumerate(files, 1):
        if not file.is_file():
            raise UserError(f"{file}: part {part} of {len(files)} is {absent(file)}; fetch it too")
        header = read_header(file)
        metadata = metadata or header.metadata
        _check_part(file, part, header.metadata, metadata)
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise UserError(
                    f"{file}: tensor {readable(name)} is in {tensors[name].file.name} too; the "
                    f"two are not of one model"
                )
            tensors[name] = tensor
    stated = metadata.get(_TENSORS, len(tensors))
    if stated != len(tensors):
        raise UserError(
            f"{files[0]}: {_TENSORS} is {shown(stated)}, and the {len(files)} parts hold "
            f"{len(tensors)}; they are not of one model"
        )
    return files[0], Header(metadata, tensors)


def _all_files(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """Return the files of the model that `path` is one of, by its name and its metadata."""
    count, number = metadata[_COUNT], metadata.get(_NUMBER)
    if type(count) is not int or not 0 < count <= _MOST_PARTS:
        raise UserError(f"{path}: {_COUNT} is {shown(count)}; convert the model anew")
    if (found := _NAME.fullmatch(path.name)) is None:
        place = f"part {number + 1} of {count}" if type(number) is int else f"one of {count} parts"
        raise UserError(
            f"{path}: {place}, and its name does not tell where the others are; give all parts the "
            f"names that they had, such as {_named(path.stem, 1, count)}"
        )
    files = [path.with_name(_named(found[1], part, count)) for part in range(1, count + 1)]
    if path not in files:
        raise UserError(
            f"{path}: its header says that it is one of {count} parts and its name says otherwise; "
            f"fetch it again, under its own name"
        )
    return files


def _named(name: str, part: int, count: int) -> str:
    return f"{name}-{part:05d}-of-{count:05d}.gguf"


def _check_part(file: Path, part: int, own: dict[str, Any], first: dict[str, Any]) -> None:
    """Refuse a file that is not part number `part` of the model whose first part says `first`."""
    if (number := own.get(_NUMBER)) != part - 1:
        place = f"part {number + 1}" if type(number) is int else "no part"
        raise UserError(
            f"{file}: by its header ({_NUMBER} {shown(number)}) it is {place}, and its name says "
            f"{part}; fetch it again, under its own name"
        )
    for key, value in own.items():
        if key not in _OF_A_FILE and first.get(key) != value:
            raise UserError(
                f"{file}: {readable(key)} is {shown(value)}, the first part says "
                f"{shown(first.get(key))}; the two are not of one model"
            )


def title(path: Path) -> str:
    """Return the name of a model by that of a file of it: without the ending, and the number."""
    found = _NAME.fullmatch(path.name)
    return path.stem if found is None else found[1]


def siblings(name: str) -> str:
    """Return the pattern of the names of all parts of a model by that of one; that of a whole model
    matches itself alone.
    """
    found = _NAME.fullmatch(name)
    return escape(name) if found is None else f"{escape(found[1])}-?????-of-{found[3]}.gguf"


def find_parts(directory: Path) -> Path | None:
    """Return a part of the model whose parts the directory holds, None if it holds none.

    Raises UserError if there are several such models.
    """
    models: dict[tuple[str, str], Path] = {}
    for file in sorted(directory.glob("*.gguf")):
        if (found := _NAME.fullmatch(file.name)) is not None:
            models.setdefault((found[1], found[3]), file)
    if len(models) > 1:
        first, second = sorted(models.values())[:2]
        raise UserError(
            f"{directory}: parts of {len(models)} models are in it, among them {first.name} and "
            f"{second.name}; give the path of one part"
        )
    return next(iter(models.values()), None)
