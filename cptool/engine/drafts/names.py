"""Where drafts come from, as users name it. Imports no torch."""

from __future__ import annotations

from cptool.errors import OptionError

DRAFTS = ("off", "lookup", "auto")
"""Where tokens are drafted from: nowhere, or what the sequence has said so far. "auto" does that
too, and does not report where the batch or the ranks do not allow it. Beside these there is
"layers:E": the first E layers of the model.
"""

_LAYERS = "layers:"


def layers_of(draft: str) -> int | None:
    """Return the E of "layers:E", None for another source."""
    return int(draft.removeprefix(_LAYERS)) if draft.startswith(_LAYERS) else None


def check_draft(draft: str, layers: int) -> None:
    """Raise OptionError unless drafts can come from there, for a model of `layers` layers."""
    if draft in DRAFTS:
        return
    if not isinstance(draft, str) or not draft.startswith(_LAYERS):
        raise OptionError("draft", draft, f"it must be one of {', '.join(DRAFTS)}, or layers:E")
    count = draft.removeprefix(_LAYERS)
    if not (count.isascii() and count.isdecimal()) or not 1 <= int(count) < layers:
        rule = f"E must be at least 1, and less than the {layers} layers of the model"
        raise OptionError("draft", draft, rule, f"such as layers:{max(1, layers // 3)}")
