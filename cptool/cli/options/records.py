"""Groups of options, each of which reaches a command as one object."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def stack(decorators: Sequence[Decorator]) -> Decorator:
    """Combine decorators into one, in the order in which help lists their options."""

    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def as_object(name: str, record: type, options: Sequence[Decorator]) -> Decorator:
    """Give a command `options`, whose values it receives as one `record` in the argument `name`.

    Each option's parameter is a field of the dataclass `record`; fields without an option here keep
    their default.
    """
    fields = [field.name for field in dataclasses.fields(record)]

    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def call(**values: Any) -> Any:
            given = {field: values.pop(field) for field in fields if field in values}
            return command(**values, **{name: record(**given)})

        return stack(options)(call)

    return apply
