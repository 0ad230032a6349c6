"""Fields of model files, each of the type that it must have; UserError if it is not."""

import json
import math
from pathlib import Path
from typing import Any

from cptool.checkpoint.lookalikes import describe
from cptool.errors import UserError

# The largest that are published, tokenizers and indexes of thousands of shards, take 40 MB.
_MAX_BYTES = 200_000_000

_SHOWN_CHARACTERS = 60


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds."""
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise UserError(
            f"{path}: {size} bytes, a JSON file of a model has at most {_MAX_BYTES}; it is not one"
        )
    data = path.read_bytes()
    try:
        fields = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if (what := describe(data)) is not None:
            raise UserError(f"{path}: not JSON but {what}") from None
        raise UserError(f"{path}: not JSON ({first_line(error)}); fetch the file again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: holds a {type(fields).__name__}, it must be a JSON object")
    return fields


def shown(value: Any) -> str:
    """Return a value as a message quotes it, cut if it is long."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def readable(name: str) -> str:
    """Return a name out of a file as a message shows it: in one line, and not without end."""
    return name if name.isprintable() and len(name) <= 60 else shown(name)


def mapping(source: Path, fields: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the object under `key`, an empty one if there is none."""
    value = fields.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{source}: {key} is {shown(value)}, it must be an object or null")
    return value or {}


def integer(source: Path, fields: dict[str, Any], key: str, default: int | None = None) -> int:
    """Return the integer under `key`, `default` if there is none and that is allowed."""
    value = default if fields.get(key) is None else fields[key]
    if type(value) is not int or abs(value) >= 2**63:
        raise UserError(
            f"{source}: {key} is {shown(value)}, it must be a 64-bit integer; correct the file"
        )
    return value


def number(source: Path, fields: dict[str, Any], key: str, default: float | None = None) -> float:
    """Return the finite number under `key`, `default` if there is none and that is allowed."""
    value: Any = default if fields.get(key) is None else fields[key]
    if type(value) not in (int, float):
        raise UserError(f"{source}: {key} is {shown(value)}, it must be a number; correct the file")
    try:
        found = float(value)
    except OverflowError:  # An integer beyond every float.
        found = math.inf
    if not math.isfinite(found):
        raise UserError(f"{source}: {key} is {found}, it must be finite; correct the file")
    return found


def flag(source: Path, fields: dict[str, Any], key: str) -> bool:
    """Return the boolean under `key`, false if there is none."""
    value = fields.get(key)
    if value is not None and type(value) is not bool:
        raise UserError(
            f"{source}: {key} is {shown(value)}, it must be true, false or null; correct the file"
        )
    return bool(value)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, to quote it inside a one-line message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def token_ids(source: Path, key: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """Return token ids out of an int, a list of ints or None, each once.

    -1, or the same in 32 unsigned bits, is how several formats write that there is no such token.
    Raises UserError for anything else.
    """
    ids = value if isinstance(value, list) else [value]
    ids = [i for i in ids if i is not None and not (type(i) is int and i in (-1, 2**32 - 1))]
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise UserError(
                f"{source}: {key} is {i!r:.60}, it must be an id in the model's vocabulary, 0 to "
                f"{vocab_size - 1}; correct the file"
            )
    return tuple(dict.fromkeys(ids))
