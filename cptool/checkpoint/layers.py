"""What files say of single layers: windows of attention, and no rotary embedding."""

from pathlib import Path
from typing import Any

from cptool.checkpoint.fields import integer, shown
from cptool.errors import UserError
from cptool.model.architectures.family import Family

MOST_LAYERS = 10_000
"""That a model may have."""


def read_windows(
    source: Path, fields: dict[str, Any], family: Family, layers: int
) -> tuple[int | None, ...] | None:
    """Return how many keys a query of each layer sees, None for all; None if no layer has a window.

    `fields` are those of the file, and the family's defaults.
    """
    _check_kinds(source, fields.get("layer_types"), family, layers)
    window = fields.get("sliding_window")
    if window in (None, 0) or fields.get("use_sliding_window") is False:
        return None
    if (is_windowed := family.is_windowed) is None:
        raise UserError(
            f"{source}: sliding_window is {shown(window)}, a {family.title} attends to the whole "
            f"context; use a checkpoint without it"
        )
    window = integer(source, fields, "sliding_window")
    for key in ("sliding_window", "sliding_window_pattern"):
        if key in fields and integer(source, fields, key) < 1:
            raise UserError(
                f"{source}: {key} is {shown(fields[key])}, it must be positive; correct the file"
            )
    found = (is_windowed(fields, layer) for layer in range(min(layers, MOST_LAYERS)))
    windows = tuple(window if windowed else None for windowed in found)
    return windows if any(windows) else None


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


def unrotated_layers(
    source: Path, fields: dict[str, Any], family: Family, layers: int
) -> tuple[int, ...]:
    """Return the numbers of the layers without a rotary embedding.

    `no_rope_layers` has a 1 for each layer that has one, although its name says the opposite.
    """
    if family.is_unrotated is None:
        return ()
    fields = {**family.defaults, **fields}
    marks, interval = fields.get("no_rope_layers"), fields.get("no_rope_layer_interval")
    if marks is not None and (
        not isinstance(marks, list) or len(marks) != layers or any(m not in (0, 1) for m in marks)
    ):
        raise UserError(
            f"{source}: no_rope_layers is {shown(marks)}, it must have a 0 or a 1 for each of the "
            f"{layers} layers; correct the file"
        )
    if marks is None and (type(interval) is not int or interval < 1):
        raise UserError(
            f"{source}: no_rope_layer_interval is {shown(interval)}, it must be positive; correct "
            f"the file"
        )
    return tuple(n for n in range(min(layers, MOST_LAYERS)) if family.is_unrotated(fields, n))
