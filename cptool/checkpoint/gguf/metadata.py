"""Typed values out of the metadata of a GGUF file."""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cptool.checkpoint.fields import shown
from cptool.errors import UserError

_KINDS = {int: "an integer", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Metadata:
    """The metadata of the file `path`; the keys of its model begin with `architecture`."""

    path: Path
    values: dict[str, Any]
    architecture: str

    def key(self, name: str) -> str:
        """Return the whole key of a field of the architecture."""
        return f"{self.architecture}.{name}"

    def has(self, name: str) -> bool:
        """Return whether a field of the architecture is set."""
        return self.values.get(self.key(name)) is not None

    def integer(self, name: str, default: int | None = None) -> int:
        """Return an integer field of the architecture; UserError if it is anything else."""
        value: int = self._value(name, int, default)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a float field of the architecture; UserError if it is anything else."""
        return shortest(self._value(name, float, default))

    def flag(self, name: str) -> bool:
        """Return a field of the architecture that is true or false; UserError if it is neither."""
        value: bool = self._value(name, bool, None)
        return value

    def _value(self, name: str, kind: type, default: Any) -> Any:
        key = self.key(name)
        value = self.values.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # One value per layer, all the same.
        if isinstance(value, list) and value and all(type(item) is kind for item in value):
            raise UserError(
                f"{self.path}: {key} is {shown(value)}, cptool only computes layers of one shape; "
                f"use another model"
            )
        if type(value) is not kind:
            raise UserError(
                f"{self.path}: {key} is {'missing' if value is None else shown(value)}, it must be "
                f"{_KINDS[kind]}; convert the model anew"
            )
        return value


def shortest(value: float) -> float:
    """Return the shortest decimal that rounds to the same float32: 1e-5, not 9.99999974737875e-06.

    The same model then computes with the same number, whether it came from a float32 field or from
    JSON text.
    """
    if not math.isfinite(value):
        return value
    for digits in range(1, 10):
        decimal = float(f"{value:.{digits}g}")
        if abs(decimal) < 3.5e38 and struct.pack("<f", decimal) == struct.pack("<f", value):
            return decimal
    return value
