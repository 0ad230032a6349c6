"""Which fields of model files may be ignored.

A field is used, or known to change nothing, or known to change nothing under some values. A field
on no list is refused if its name is about what a model computes, for ignoring it could change
every token. Any other one is noted if it is set, for it may matter to the user.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cptool.checkpoint.fields import readable, shown
from cptool.checkpoint.notes import Notes
from cptool.errors import UserError

# Parts of names that are about what a model computes. The first group counts anywhere in a word,
# the second at its beginning or its end: "property" and "capability" do not count.
_SUBJECTS = re.compile(
    r"rotary|attention|attn|norm|scal(?:e|ing)|multiplier|bias|softcap|causal|expert|window"
    r"|quantiz|lora"
    r"|(?:^|[^a-z])(?:n?rope|n?caps?|nope|moe|alibi|yarn|ntk|mup|qk)(?=[^a-z]|$)"
    r"|(?:^|[^a-z])rope|(?<!euro)rope(?=[^a-z]|$)|cap(?:ping|ped)?(?=[^a-z]|$)"
)

# Values under which many fields change nothing.
OFF = (None, 0, False)
ONE = (None, 1)


@dataclass(frozen=True, kw_only=True)
class FieldList:
    """The known fields of one kind of file.

    `used` are read by code of their own, `harmless` change nothing whatever their values are,
    `neutral` names the values under which a field changes nothing. `unapplied` change what the
    author's own program generates, not what the model computes. `harmless_prefixes` begin the names
    of further harmless fields.
    """

    used: frozenset[str]
    harmless: frozenset[str]
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unapplied: frozenset[str] = frozenset()
    harmless_prefixes: tuple[str, ...] = ()

    def of_family(self, neutral: Mapping[str, tuple[Any, ...]], used: Iterable[str]) -> "FieldList":
        """Return the same list with further, or other, neutral values, and further used fields."""
        used = frozenset(used)
        values = {name: known for name, known in self.neutral.items() if name not in used}
        return replace(self, neutral={**values, **neutral}, used=self.used | used)


def check_fields(
    source: Path, fields: Mapping[str, Any], known: FieldList, notes: Notes | None = None
) -> None:
    """Add fields that are ignored although they are set to `notes`.

    Raises UserError for a field that changes what the model computes in a way that cptool does not,
    or may do so.
    """
    notes = Notes() if notes is None else notes
    for name, value in fields.items():
        if name in known.neutral:
            if not any(_same(value, allowed) for allowed in known.neutral[name]):
                raise UserError(
                    f"{source}: {readable(name)} is {shown(value)}, which is not supported: cptool "
                    f"computes a Llama where it is absent or {known.neutral[name][-1]!r}; use a "
                    f"checkpoint without it"
                )
        elif name in known.used or name in known.harmless:
            continue
        elif name.startswith(known.harmless_prefixes) or _is_unset(value):
            continue
        elif name not in known.unapplied and speaks_of_the_model(name):
            raise UserError(
                f"{source}: {readable(name)} is {shown(value)}; cptool does not know this field, "
                f"and ignoring it could change the answer; remove it if it changes nothing, or use "
                f"another checkpoint"
            )
        elif not _is_plain(value):
            ignored = notes.unapplied if name in known.unapplied else notes.unknown
            ignored.append(readable(name))


def speaks_of_the_model(name: str) -> bool:
    """Return whether the name of a field is about what a model computes."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return _SUBJECTS.search(words) is not None


def _same(value: Any, allowed: Any) -> bool:
    """Return whether two values are equal, and both or neither of them are booleans."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _is_unset(value: Any) -> bool:
    """Return whether a value says nothing. False and 0 do say something: `is_causal` is a field."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _is_plain(value: Any) -> bool:
    """Return whether a value is one that a field of most kinds has if nothing is set."""
    return _is_unset(value) or (
        isinstance(value, bool | int | float) and value in (0, 1) and (value is not True)
    )
