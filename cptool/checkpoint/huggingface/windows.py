"""Which layers of a `config.json` attend to a window of the context alone."""

from pathlib import Path
from typing import Any

from cptool.checkpoint.fields import integer, shown
from cptool.errors import UserError
from cptool.model.architectures.family import Family


def check_windows(
    source: Path, fields: dict[str, Any], family: Family, *, layers: int, positions: int
) -> None:
    """Raise UserError if a layer attends to less than the `positions` of the whole context.

    `fields` are those of the file, and the family's defaults.
    """
    _check_kinds(source, fields.get("layer_types"), family, layers)
    window = fields.get("sliding_window")
    if window in (None, 0) or fields.get("use_sliding_window") is False:
        return
    if family.is_windowed is not None and (
        integer(source, fields, "sliding_window") >= positions
        or not any(family.is_windowed(fields, layer) for layer in range(layers))
    ):
        return
    raise UserError(
        f"{source}: sliding_window is {shown(window)}, and cptool computes attention to the "
        f"whole context; use a checkpoint without it"
    )


def _check_kinds(source: Path, kinds: Any, family: Family, layers: int) -> None:
    """Refuse layers of kinds that no family has, of which newer configurations have a list."""
    if kinds is None:
        return
    known = ["full_attention"]
    if family.is_windowed is not None:
        known.append("sliding_attention")
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise UserError(
            f"{source}: layer_types is {shown(kinds)}, cptool only computes layers of full "
            f"attention; use another checkpoint"
        )
    if len(kinds) != layers:
        raise UserError(
            f"{source}: layer_types has {len(kinds)} entries for {layers} layers; correct the file"
        )
