"""docs/json.md as tests read it: sections with tables of fields, and values held against them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "json.md"
_PLAIN = {"string": str, "boolean": bool, "integer": int, "number": (int, float)}
_PLAIN["string or number"] = (str, int, float)


@dataclass(frozen=True)
class Field:
    """A row of a table. type: without what `optional` says."""

    name: str
    type: str
    optional: bool
    unit: str
    meaning: str


@dataclass
class Section:
    """A heading with a table. includes: headings whose fields these objects have, too."""

    heading: str
    includes: list[str] = field(default_factory=list)
    own: dict[str, Field] = field(default_factory=dict)


class Document:
    """The sections by heading, and which of their fields `check` has met."""

    def __init__(self, text: str) -> None:
        self.sections = dict(_sections(text))
        self.printed: set[tuple[str, str]] = set()

    def fields(self, heading: str) -> dict[str, tuple[str, Field]]:
        """All fields of such an object, each with the heading that documents it."""
        section, found = self.sections[heading], {}
        for included in section.includes:
            found |= self.fields(included)
        return found | {name: (heading, each) for name, each in section.own.items()}

    def check(self, value: Any, *headings: str) -> list[str]:
        """What is wrong with an object that has the fields of `headings`, one line each."""
        known: dict[str, tuple[str, Field]] = {}
        for heading in headings:
            known |= self.fields(heading)
        return list(self._object(value, known, headings[-1]))

    def unprinted(self) -> set[tuple[str, str]]:
        """Headings and names of the fields that no checked object had."""
        every = {(s.heading, name) for s in self.sections.values() for name in s.own}
        return every - self.printed

    def _object(self, value: Any, known: dict[str, tuple[str, Field]], where: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{where} is {value!r}, not an object"
            return
        for name in value.keys() - known.keys():
            yield f"{where}: {name!r} is not documented (it is {value[name]!r:.80})"
        for name, (heading, row) in known.items():
            if name in value:
                self.printed.add((heading, name))
                yield from self._typed(value[name], row.type, f"{where}, {name}")
            elif not row.optional:
                yield f"{where}: {name!r} is documented and not there"

    def _typed(self, value: Any, type: str, where: str) -> Iterator[str]:
        type, null = _without(type, " or null")
        if null and value is None:
            return
        if type.startswith("(") and type.endswith(")"):
            yield from self._typed(value, type[1:-1], where)
        elif type.startswith("list of "):
            if not isinstance(value, list):
                yield f"{where} is {value!r}, not a {type}"
                return
            for each in value:
                yield from self._typed(each, type.removeprefix("list of "), where)
        elif type.startswith("map of "):
            if not isinstance(value, dict):
                yield f"{where} is {value!r}, not a {type}"
                return
            for name, each in value.items():
                yield from self._typed(each, type.removeprefix("map of "), f"{where}, {name}")
        elif link := re.fullmatch(r"\[([^]]+)\]\(#[^)]+\)", type):
            yield from self._object(value, self.fields(link[1]), f"{where} ({link[1]})")
        elif type.startswith("["):
            types = type[1:-1].split(", ")
            if not isinstance(value, list) or len(value) != len(types):
                yield f"{where} is {value!r}, not {type}"
                return
            for each, of in zip(value, types, strict=True):
                yield from self._typed(each, of, where)
        elif not isinstance(value, _PLAIN[type]) or (type != "boolean" and isinstance(value, bool)):
            yield f"{where} is {value!r}, not a {type}"


def _without(text: str, end: str) -> tuple[str, bool]:
    return text.removesuffix(end), text.endswith(end)


def _sections(text: str) -> Iterator[tuple[str, Section]]:
    for part in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        section = Section(heading.replace("`", "").strip())
        section.includes += re.findall(r"[Ww]ith\s+the\s+fields\s+of\s+\[([^]]+)\]", body)
        for line in body.splitlines():
            if line.startswith("| `"):
                name, type, unit, meaning = (cell.strip() for cell in line.strip("|").split("|"))
                type, optional = _without(type, ", optional")
                section.own[name.strip("`")] = Field(name.strip("`"), type, optional, unit, meaning)
        if section.own or section.includes:
            yield section.heading, section
