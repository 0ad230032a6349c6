"""The types of rotary scaling in a `config.json`, with the fields that each of them has."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cptool.checkpoint.fields import flag, number, shown
from cptool.errors import UserError
from cptool.model.config import RopeScaling


@dataclass(frozen=True, kw_only=True)
class Stated:
    """The fields of a rotary scaling, beside `max_position_embeddings` and the original context."""

    source: Path
    fields: dict[str, Any]
    positions: int
    original: int | None

    def number(self, key: str, default: float | None = None) -> float:
        """Return the number under `key`."""
        return number(self.source, self.fields, key, default)

    @property
    def original_context(self) -> int:
        """The context before scaling, the model's own if nothing states it."""
        return self.positions if self.original is None else self.original

    @property
    def stretched(self) -> float:
        """By how much the context has grown, which is the factor of some types that state none."""
        return self.positions / max(self.original_context, 1)

    def factors(self, key: str) -> tuple[float, ...]:
        """Return a list of positive numbers, one of each frequency."""
        found = self.fields.get(key)
        if not isinstance(found, list) or not all(
            type(each) in (int, float) and 0 < each < math.inf for each in found
        ):
            raise UserError(
                f"{self.source}: {key} is {shown(found)}, it must be a list of positive numbers; "
                f"correct the file"
            )
        return tuple(map(float, found))


@dataclass(frozen=True)
class Scaling:
    """A type of scaling: how it is read, and the fields that other types have not."""

    read: Callable[[Stated], RopeScaling]
    fields: tuple[str, ...] = ()


def _linear(stated: Stated) -> RopeScaling:
    return RopeScaling(kind="linear", factor=stated.number("factor"))


def _dynamic(stated: Stated) -> RopeScaling:
    return RopeScaling(
        kind="dynamic", factor=stated.number("factor"), original_context=stated.positions
    )


def _llama3(stated: Stated) -> RopeScaling:
    return RopeScaling(
        kind="llama3",
        factor=stated.number("factor"),
        low_freq_factor=stated.number("low_freq_factor"),
        high_freq_factor=stated.number("high_freq_factor"),
        original_context=stated.original_context,
    )


def _yarn(stated: Stated) -> RopeScaling:
    fields = stated.fields
    factor = stated.number("factor", stated.stretched)
    both = stated.number("mscale", 0.0), stated.number("mscale_all_dim", 0.0)
    if fields.get("attention_factor") is not None:
        attention_factor = stated.number("attention_factor")
    elif all(both):
        attention_factor = yarn_attention_factor(factor, both[0])
        attention_factor /= yarn_attention_factor(factor, both[1])
    else:
        attention_factor = yarn_attention_factor(factor)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=stated.original_context,
        attention_factor=attention_factor,
        beta_fast=stated.number("beta_fast", 0.0) or 32.0,
        beta_slow=stated.number("beta_slow", 0.0) or 1.0,
        query_beta=stated.number("llama_4_scaling_beta", 0.0) or None,
        truncate="truncate" not in fields or flag(stated.source, fields, "truncate"),
    )


def yarn_attention_factor(factor: float, multiplier: float = 1.0) -> float:
    """Return 0.1 m ln(factor) + 1, 1 if the context has not grown (Peng et al., 2023)."""
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def _longrope(stated: Stated) -> RopeScaling:
    factor = stated.number("factor", stated.stretched)
    if stated.fields.get("attention_factor") is not None:
        attention_factor = stated.number("attention_factor")
    else:
        attention_factor = longrope_attention_factor(factor, stated.original_context)
    return RopeScaling(
        kind="longrope",
        factor=factor,
        original_context=stated.original_context,
        attention_factor=attention_factor,
        short_factors=stated.factors("short_factor"),
        long_factors=stated.factors("long_factor"),
    )


def longrope_attention_factor(factor: float, original: int) -> float:
    """Return sqrt(1 + ln(factor) / ln(original context)), 1 if the context has not grown."""
    if factor <= 1 or original < 2:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))


_YARN = ("attention_factor", "mscale", "mscale_all_dim")

SCALINGS = {
    "linear": Scaling(_linear),
    "dynamic": Scaling(_dynamic),
    "llama3": Scaling(_llama3),
    "yarn": Scaling(_yarn, _YARN),
    "longrope": Scaling(_longrope, ("attention_factor", "short_factor", "long_factor")),
}
