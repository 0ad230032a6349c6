"""How the author of a model samples from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cptool.checkpoint.fields import number
from cptool.checkpoint.notes import Notes


@dataclass(frozen=True)
class SamplingDefaults:
    """The author's temperature and top-p; None if the files state none.

    `temperature` is at least 0, where 0 is greedy; `top_p` is within (0, 1].
    """

    temperature: float | None = None
    top_p: float | None = None


def read_sampling(
    source: Path, fields: dict[str, Any], names: tuple[str, str], notes: Notes
) -> SamplingDefaults:
    """Return what `fields` state under the `names` of the temperature and of top-p.

    A number that is none of these is noted and ignored; UserError if it is no number at all.
    """
    temperature, top_p = (
        None if fields.get(name) is None else number(source, fields, name) for name in names
    )
    if temperature is not None and temperature < 0:
        notes.add(f"{source}: {names[0]} is {temperature}, which is below 0, and is ignored")
        temperature = None
    if top_p is not None and not 0 < top_p <= 1:
        notes.add(f"{source}: {names[1]} is {top_p}, which is not in (0, 1], and is ignored")
        top_p = None
    return SamplingDefaults(temperature, top_p)
