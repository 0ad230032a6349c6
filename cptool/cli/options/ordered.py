"""Options of several kinds whose order on the command line counts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import click

from cptool.cli.options.records import Decorator, stack


class OrderedOption(click.Option):
    """A repeatable option whose place among the others of its group is kept.

    click hands over the values of each option together, so the parser's own hook notes each
    occurrence.
    """

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        option = parser._long_opt[self.opts[0]]
        option.process = self._noting(option.process, ctx)

    def _noting(self, process: Callable[..., None], ctx: click.Context) -> Callable[..., None]:
        def noting(value: Any, state: Any) -> None:
            ctx.meta.setdefault(__name__, []).append(self.opts[0])
            process(value, state)

        return noting


def ordered(argument: str, options: Sequence[tuple[str, dict[str, Any]]]) -> Decorator:
    """Give a command repeatable options, whose values it receives in the command line's order.

    options: the name of each, such as "--prompt", and its settings for `click.option`. The command
    receives pairs of such a name and a value in `argument`. Values from elsewhere than the command
    line, such as environment variables, come last.
    """
    decorators = [
        click.option(name, _parameter(argument, name), cls=OrderedOption, multiple=True, **settings)
        for name, settings in options
    ]

    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def call(**values: Any) -> Any:
            given = {name: list(values.pop(_parameter(argument, name))) for name, _ in options}
            noted = click.get_current_context().meta.get(__name__, [])
            pairs = [(name, given[name].pop(0)) for name in noted if given[name]]
            pairs += [(name, value) for name, left in given.items() for value in left]
            return command(**values, **{argument: tuple(pairs)})

        return stack(decorators)(call)

    return apply


def _parameter(argument: str, name: str) -> str:
    return f"{argument}_{name.strip('-').replace('-', '_')}"
