"""How the author of a model samples from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cptool.checkpoint.fields import integer, number
from cptool.checkpoint.notes import Notes


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """The author's values of a `cptool.engine.sampling.Sampling`; None if the files state none.

    Each is within its range: `temperature` at least 0, where 0 is greedy; `top_p` in (0, 1];
    `top_k` at least 0, where 0 keeps every token; `min_p` in [0, 1]; `repetition_penalty` above 0.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value >= 0, "below 0"),
    "top_p": (lambda value: 0 < value <= 1, "not in (0, 1]"),
    "top_k": (lambda value: value >= 0, "below 0"),
    "min_p": (lambda value: 0 <= value <= 1, "not in [0, 1]"),
    "repetition_penalty": (lambda value: value > 0, "not above 0"),
}


def read_sampling(
    source: Path, fields: Mapping[str, Any], names: Mapping[str, str], notes: Notes
) -> SamplingDefaults:
    """Return what `fields` state; `names` are their names there, by those of `SamplingDefaults`.

    A number out of range is noted and ignored; UserError if it is no number at all.
    """
    found: dict[str, Any] = {}
    for own, name in names.items():
        if fields.get(name) is None:
            continue
        read: Callable[..., float] = integer if own == "top_k" else number
        value = read(source, fields, name)
        fits, fault = _RANGES[own]
        if fits(value):
            found[own] = value
        else:
            notes.add(f"{source}: {name} is {value}, which is {fault}, and is ignored")
    return SamplingDefaults(**found)
