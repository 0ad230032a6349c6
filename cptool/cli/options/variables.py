"""Options that environment variables give a default: `CPTOOL_CP=2` stands for `--cp 2`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from click.core import ParameterSource


class VariableOption(click.Option):
    """An option that has an `envvar`; where its value came from there, an error can name it.

    The context's object, a dictionary that all contexts of a command line share, gets the name of
    the variable for each option that took its value.
    """

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> tuple[Any, list[str]]:
        try:
            return super().handle_parse_result(ctx, opts, args)
        finally:
            source = ctx.get_parameter_source(self.name) if self.name else None
            if source is ParameterSource.ENVIRONMENT and isinstance(self.envvar, str):
                ctx.ensure_object(dict)[self.opts[0]] = self.envvar


def with_origins(line: str, origins: Mapping[str, str]) -> str:
    """Return an error's line, with the variables that gave the options it names."""
    words = line.replace("'", " ").replace(":", " ").split()
    taken = [f"{flag} is from {name}" for flag, name in origins.items() if flag in words]
    return f"{line} ({', '.join(taken)})" if taken else line
