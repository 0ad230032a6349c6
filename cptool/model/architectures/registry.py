"""All model families: each module of this folder that has a `FAMILY`, and those registered."""

import importlib
import pkgutil
from functools import cache

from cptool.model import architectures
from cptool.model.architectures.family import Family


def families() -> tuple[Family, ...]:
    """Return all families."""
    return tuple(_registered().values())


def find_family(name: str) -> Family:
    """Return the family that a configuration's `family` names."""
    return _registered()[name]


def register(family: Family) -> None:
    """Add a family that has no module in this folder, for this process."""
    _registered()[family.name] = family


@cache
def _registered() -> dict[str, Family]:
    found = {}
    for module in pkgutil.iter_modules(architectures.__path__):
        loaded = importlib.import_module(f"{architectures.__name__}.{module.name}")
        if isinstance(family := getattr(loaded, "FAMILY", None), Family):
            found[family.name] = family
    return found
