"""`cptool models`: the families of models that cptool computes."""

from __future__ import annotations

from typing import Any

import click

from cptool.cli.figures.tables import Column, show
from cptool.cli.json_output import print_object
from cptool.cli.options.common import json_option
from cptool.cli.options.examples import examples
from cptool.model.architectures.family import Family
from cptool.model.architectures.registry import families


@click.command(
    short_help="List the families of models that are supported.",
    epilog=examples("cptool models"),
)
@json_option
def models(as_json: bool) -> None:
    """List the families of models that cptool computes, by the names that files give them.

    A config.json names its architecture, a GGUF file its own. Whatever a family has that cptool
    does not compute is refused when a file states it.
    """
    found = [_fields(family) for family in families()]
    if as_json:
        print_object({"families": found})
        return
    columns = [
        Column(name="family", left=True),
        Column(name="models", left=True),
        Column(name="architecture in config.json", rank=1, left=True),
        Column(name="in GGUF", rank=1, left=True),
        Column(name="refused", left=True),
    ]
    rows = [
        [
            each["title"],
            each["members"],
            each["architectures"][0],
            each["gguf"] or "as a Llama",
            each["refused"] or "-",
        ]
        for each in found
    ]
    show(columns, rows, caption="Mixtures of experts are refused by name.")


def _fields(family: Family) -> dict[str, Any]:
    return {
        "name": family.name,
        "title": family.title,
        "members": family.members,
        "architectures": list(family.architectures),
        "gguf": family.gguf,
        "refused": family.refused,
    }
