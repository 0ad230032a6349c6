"""A model's context: how long a sequence may be, and what that leaves for an answer."""

from collections.abc import Sequence
from dataclasses import replace

from cptool.errors import OptionError, UserError
from cptool.model.config import LlamaConfig

# Positions are 32-bit integers.
_MOST_POSITIONS = 2**31 - 1


def with_context(config: LlamaConfig, length: int) -> LlamaConfig:
    """Return `config` with a context of `length` positions. Raises OptionError if they cannot be
    numbered.
    """
    if type(length) is not int or not 1 <= length <= _MOST_POSITIONS:
        rule = f"it must be a whole number, at least 1; positions go up to {_MOST_POSITIONS}"
        raise OptionError("context_length", length, rule)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic" and length > scaling.original_context:
        raise OptionError(
            "context_length",
            length,
            "dynamic rotary scaling changes keys that are in the cache as a sequence grows beyond "
            f"{scaling.original_context} tokens",
            f"use at most {scaling.original_context}",
        )
    return replace(config, max_position_embeddings=length)


def check_context(
    new: Sequence[int], cached: Sequence[int], more: int, config: LlamaConfig
) -> None:
    """Raise UserError for sequences longer than the context of the model.

    new, cached: tokens of each sequence. more: further ones that each of them gets.
    """
    for b, (added, held) in enumerate(zip(new, cached, strict=True), 1):
        if added + held + more > config.max_position_embeddings:
            parts = (
                [f"{held} cached"] * bool(held)
                + [f"{added} new"]
                + [f"{more} to come"] * bool(more)
            )
            raise UserError(
                f"sequence {b} has {added + held + more} tokens ({', '.join(parts)}), the model's "
                f"context is {config.max_position_embeddings}; shorten it, or give "
                "`context_length` if the model was made for more"
            )


def answer_limit(
    wanted: int, config: LlamaConfig, *, new: Sequence[int], held: Sequence[int]
) -> int:
    """Return how many tokens each answer may have: `wanted`, or less if the context has no room.

    new: the number of tokens of each prompt. held: how many are before them.

    Raises UserError if the context has no room for a single token, unless `wanted` is 0.
    """
    check_context(new, held, min(wanted, 1), config)
    longest = max(n + h for n, h in zip(new, held, strict=True))
    return min(wanted, config.max_position_embeddings - longest)
