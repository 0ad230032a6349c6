"""Tokens of a vocabulary that stand for parts of images, which answers leave out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cptool.checkpoint.fields import token_ids
from cptool.errors import UserError
from cptool.model.architectures.family import Family


def find_image_ids(
    source: Path, field: str, names: Mapping[str, Any], *, family: Family, vocab_size: int
) -> tuple[tuple[int, int], ...]:
    """Return the ranges [start, stop) of the tokens that `names` has as parts of images.

    names: ids by name, from the field `field` of `source`. Raises UserError if a family that has
    such tokens names none.
    """
    if (prefix := family.image_tokens) is None:
        return ()
    ids = [i for name, i in names.items() if str(name).startswith(prefix)]
    found = sorted(token_ids(source, field, ids, vocab_size))
    if not found:
        raise UserError(
            f"{source}: {field} names no image tokens ({prefix}...), which answers must leave out; "
            f"fetch the file again"
        )
    breaks = [n for n in range(1, len(found)) if found[n] != found[n - 1] + 1]
    starts, stops = [0, *breaks], [*breaks, len(found)]
    return tuple((found[a], found[b - 1] + 1) for a, b in zip(starts, stops, strict=True))
