"""Fields of JSON files, each of the type that it must have; UserError where it is not."""

import json
from pathlib import Path
from typing import Any

from cptool.checkpoint.base import first_line
from cptool.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({first_line(error)}); fetch the file again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: holds a {type(fields).__name__}, it must be a JSON object")
    return fields


def mapping(source: Path, fields: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under `key`, an empty one where there is none."""
    value = fields.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{source}: {key} is {value!r}, it must be an object or null")
    return value or {}


def integer(source: Path, fields: dict[str, Any], key: str, default: int | None = None) -> int:
    """The integer under `key`; `default` where there is none, if that is allowed."""
    value = default if fields.get(key) is None else fields[key]
    if type(value) is not int:
        raise UserError(f"{source}: {key} is {value!r}, it must be an integer; mend the file")
    return value


def number(source: Path, fields: dict[str, Any], key: str, default: float | None = None) -> float:
    """The number under `key`; `default` where there is none, if that is allowed."""
    value = default if fields.get(key) is None else fields[key]
    if type(value) not in (int, float):
        raise UserError(f"{source}: {key} is {value!r}, it must be a number; mend the file")
    return float(value)
