"""Lines for the user about a checkpoint that is accepted."""

from dataclasses import dataclass, field

_SHOWN = 8


@dataclass
class Notes:
    """What is noted while a checkpoint is opened.

    `unknown` are fields that cptool does not know, `unapplied` fields that it knows and does not
    apply, such as ways to sample; each kind becomes one line.
    """

    choices: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    unapplied: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Note a choice between two answers, once."""
        if line not in self.choices:
            self.choices.append(line)

    def lines(self) -> tuple[str, ...]:
        """Return all notes, one line each."""
        lines = list(self.choices)
        if self.unknown:
            lines.append(f"fields that cptool does not know were ignored: {_listed(self.unknown)}")
        if self.unapplied:
            lines.append(
                f"sampling fields that cptool does not apply were ignored: "
                f"{_listed(self.unapplied)}"
            )
        return tuple(lines)


def _listed(fields: list[str]) -> str:
    names = list(dict.fromkeys(fields))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
