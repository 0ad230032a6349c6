"""The one JSON object that --json prints; `docs/json.md` documents its fields for every command."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import click

SCHEMA = 1
"""Version of all objects: it rises when a field is removed or renamed, or when its type, unit or
meaning changes."""


def print_object(fields: Mapping[str, Any]) -> None:
    """Print exactly one JSON object, in one line on standard output, that begins with "schema"."""
    click.echo(line(fields))


def line(fields: Mapping[str, Any]) -> str:
    """Return `fields` after "schema" as one line of JSON; JSON has no infinities and no NaN, so
    these are null.
    """
    if "schema" in fields:
        raise ValueError('"schema" is the version of the object; give the field another name')
    return plain_line({"schema": SCHEMA, **fields})


def plain_line(fields: Mapping[str, Any]) -> str:
    """Return `fields` as one line of JSON, as `line` does, for lines of which another has the
    "schema".
    """
    return json.dumps(_finite(fields), allow_nan=False)


def shown(value: Any, most: int = 40) -> str:
    """Return a value read from JSON as a message quotes it: its beginning, if it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value
