"""Types of options: numbers of tokens, bytes and heads, and durations, as people write them."""

from __future__ import annotations

import re
from typing import Any

import click

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class TokenCount(click.ParamType):
    """128000, 128K, 1M: decimal, as the paper's; 128Ki and 1Mi are powers of two."""

    name = "tokens"

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([km]i?|)", value.strip().lower())
        count = float(match[1]) * _UNITS[match[2]] if match else -1.0
        if count < self.least or count != int(count):
            self.fail(
                f"{value!r} must be a whole number of at least {self.least}, "
                "such as 128000, 128K, 1M or 128Ki",
                param,
                ctx,
            )
        return int(count)


class Chunk(TokenCount):
    """`auto`, which is None, or a number of tokens."""

    name = "chunk"

    def convert(  # type: ignore[override]
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        return None if value == "auto" else super().convert(value, param, ctx)


class Bytes(click.ParamType):
    """A size such as 1K, 4M or 65536: decimal, as tables show them; 4Mi is a power of two."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)([kmg]i?|)", value.strip().lower())
        size = int(match[1]) * _UNITS[match[2]] if match else 0
        if size < 1:
            self.fail(
                f"{value!r} must be a positive number of bytes, such as 1K, 4M or 4Mi", param, ctx
            )
        return size


class Heads(click.ParamType):
    """QUERY/KV heads, such as 32/8."""

    name = "heads"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)/(\d+)", value)
        query, kv = (int(match[1]), int(match[2])) if match else (0, 0)
        if not query or not kv or query % kv:
            self.fail(
                f"{value!r} must be QUERY/KV heads, the first a multiple of the second, "
                "such as 32/8",
                param,
                ctx,
            )
        return query, kv


class TokenBias(click.ParamType):
    """ID=VALUE, such as 198=-5.5: a token id and a number."""

    name = "bias"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        token, _, bias = value.partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(
                f"{value!r} must be ID=VALUE, a token id and a number, such as 198=-5.5", param, ctx
            )


class Duration(click.ParamType):
    """Seconds: `10`, `10s`, `800ms`, `2min`."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*(ms|s|min)?", str(value))
        if not match or not float(match[1]):
            self.fail(
                f"{value!r} is not a duration; write seconds, such as 10s or 800ms", param, ctx
            )
        return float(match[1]) * {"ms": 1e-3, "s": 1.0, "min": 60.0}[match[2] or "s"]
