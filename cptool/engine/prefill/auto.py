"""How many tokens of a prompt go through the model at a time, where that is left to cptool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cptool.engine.setup import memory
from cptool.planning.chunks import UNIT, auto_chunk, efficient_chunk, plan_chunk

if TYPE_CHECKING:
    from cptool.engine.engine import Engine
    from cptool.planning.cost.forward import Forward

SMALL, MODEST = 4096, 16384
"""Prompts of at most so many tokens, of all sequences, go through in one piece: in any case, and if
that fits in memory."""


def chunk_for(
    engine: Engine,
    left: Sequence[int],
    cached: Sequence[int],
    *,
    answer: int = 0,
    every: float | None = None,
) -> int:
    """Return the most new tokens of a forward, of `left[b]` tokens to read over `cached[b]` ones.
    Collective.

    That is the number that was requested; else the largest whose predicted peak fits what a rank
    may take, and does not take it for little (`auto_chunk`); all of a prompt that is `SMALL`.

    answer: tokens after each sequence for which there is to be room.
    every: seconds that a chunk may be predicted to take, as far as smaller ones are efficient; what
        is computed of a prompt can only be kept between chunks.
    """
    options, whole = engine.options, sum(left)
    if options.chunk is not None:
        return min(options.chunk, whole)
    forward = replace(engine.forward(left), cached=sum(cached))
    if whole <= SMALL or forward.dtype not in engine.profile.linear_flops:
        return whole  # the cost model does not cover other types
    asked, profile = engine.variant, engine.profile
    room = sum(cached) + whole + answer * len(left)
    limit = memory.limit(engine.world, options.memory)
    chunk = whole
    if (
        whole > MODEST
        or plan_chunk(forward, profile, variant=asked, room=room).memory_bytes > limit
    ):
        chunk = auto_chunk(forward, profile, limit, variant=asked, room=room) or UNIT
    if every is not None and _last(engine, forward, min(chunk, whole)) > every:
        least = efficient_chunk(forward, profile, variant=asked)
        while chunk > least and _last(engine, forward, chunk) > every:
            chunk = max(least, chunk // 2 // UNIT * UNIT)
    return min(chunk, whole)


def _last(engine: Engine, whole: Forward, chunk: int) -> float:
    """Return the predicted seconds of the last chunk of this size, which takes the longest."""
    last = replace(whole, new=chunk, cached=whole.cached + whole.new - chunk)
    return plan_chunk(last, engine.profile, variant=engine.variant).seconds
