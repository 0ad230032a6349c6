"""A prompt in chunks: what each of them takes, in seconds and bytes, and how large one may be.

A chunk is a forward over some new tokens on top of all that came before. Everything here is
arithmetic on a `Forward` that describes the whole prompt, and imports no torch; ranks that give the
same arguments get the same answer. An engine uses it like this, before anything is allocated:

    whole = Forward(config=..., dtype="float32", kv_dtype="bfloat16", weight_size=...,
                    new=sum(lengths), cached=sum(cached), ranks=cp, active=cp, tp=tp, batch=...)
    room = tokens of prompts and answers that the cache has room for, of all sequences and CP ranks
    limit = the least of what any rank may take, in bytes, the same on all ranks
    tokens = auto_chunk(whole, profile, limit, variant=variant, room=room)

and then, before each forward, `plan_chunk` of that forward for its variant and the time it should
take, or `plan_chunks` of the whole prompt for the time that is left. Tokens are always those of all
sequences together, as in `Forward`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cptool.planning.cost.estimate import Estimate, prefill
from cptool.planning.cost.forward import Forward
from cptool.planning.cost.memory import memory_per_rank
from cptool.planning.hardware import HardwareProfile
from cptool.planning.strategy import AUTO, Choice, choose

UNIT = 512
"""Chunks whose size is computed are a multiple of this many tokens."""
SLOWER = 1.015
"""An efficient chunk is the smallest one with which the prompt is predicted to take at most this
many times as long as in one piece: half of the 3% that it may take, because attention over all of a
long prompt reaches a rate that is a few percent above the measured one."""
SPARE = 0.25
"""Beyond an efficient chunk, `auto_chunk` uses no more memory than this part of weights and KV: the
few percent of time that are left to gain are not worth it."""
_SAMPLES = 16

Chooser = Callable[[str, Forward, HardwareProfile], Choice]
"""Picks the variant of a forward, as `cptool.planning.strategy.choose` does."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """`new` tokens over `cached` ones, under the variant of `choice`.

    memory: bytes on the fullest rank while it runs, by use: `memory_per_rank`.
    """

    new: int
    cached: int
    choice: Choice
    estimate: Estimate
    memory: dict[str, float]

    @property
    def seconds(self) -> float:
        """Predicted seconds of the forward."""
        return self.estimate.seconds

    @property
    def memory_bytes(self) -> float:
        """Bytes on the fullest rank while it runs."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Chunks:
    """All chunks of a prompt, in order. Its sums are those of `Estimate`, over all of them."""

    chunks: tuple[Chunk, ...]

    @cached_property
    def parts(self) -> dict[str, float]:
        """Seconds by part; they add up to `seconds`."""
        each = [chunk.estimate.parts for chunk in self.chunks]
        return {name: sum(parts[name] for parts in each) for name in each[0]}

    @property
    def seconds(self) -> float:
        """Seconds to the first token."""
        return sum(self.parts.values())

    @property
    def exposed_s(self) -> float:
        """Seconds of transfers that compute does not hide."""
        return sum(chunk.estimate.exposed_s for chunk in self.chunks)

    @property
    def hidden_s(self) -> float:
        """Seconds of transfers under compute."""
        return sum(chunk.estimate.hidden_s for chunk in self.chunks)

    @property
    def wire_bytes(self) -> float:
        """Bytes that a rank sends to other CP ranks."""
        return sum(chunk.estimate.wire_bytes for chunk in self.chunks)

    @property
    def tensor_parallel_bytes(self) -> float:
        """Bytes that a rank sends to other TP ranks."""
        return sum(chunk.estimate.tensor_parallel_bytes for chunk in self.chunks)

    @property
    def last(self) -> Chunk:
        """The chunk after which the first token is known."""
        return self.chunks[-1]

    @cached_property
    def fullest(self) -> Chunk:
        """The chunk that needs the most memory."""
        return max(self.chunks, key=lambda chunk: chunk.memory_bytes)

    @property
    def switches(self) -> list[tuple[int, str]]:
        """(tokens cached, variant): where each variant begins to be used."""
        runs = itertools.groupby(self.chunks, key=lambda chunk: chunk.choice.variant)
        return [(next(run).cached, variant) for variant, run in runs]


def plan_chunk(
    forward: Forward,
    profile: HardwareProfile,
    *,
    variant: str = AUTO,
    room: int | None = None,
    chooser: Chooser = choose,
) -> Chunk:
    """Predict one forward: its variant, its seconds, and the peak of a rank's memory.

    forward: its number of active ranks is not read.
    variant: used as it is, or "auto".
    room: tokens that the cache has room for, by default those that the forward leaves in it.
    """
    choice = chooser(variant, forward, profile)
    shared = replace(forward, active=choice.active)
    return Chunk(
        new=forward.new,
        cached=forward.cached,
        choice=choice,
        estimate=prefill(choice.variant, shared, profile),
        memory=memory_per_rank(choice.variant, shared, profile, room),
    )


def plan_chunks(
    whole: Forward,
    profile: HardwareProfile,
    chunk: int,
    *,
    variant: str = AUTO,
    room: int | None = None,
    chooser: Chooser = choose,
) -> Chunks:
    """Predict a prompt that goes through in chunks of `chunk` tokens, the last one of the rest.

    whole: the prompt in one piece: all new tokens over those that are cached before the first
        chunk. The other arguments are those of `plan_chunk`; `room` defaults to the whole prompt.
    """
    room = max(room or 0, whole.cached + whole.new)
    return Chunks(
        tuple(
            plan_chunk(part, profile, variant=variant, room=room, chooser=chooser)
            for part in _parts(whole, chunk)
        )
    )


def peak_memory(
    whole: Forward,
    profile: HardwareProfile,
    chunk: int,
    *,
    variant: str = AUTO,
    room: int | None = None,
    chooser: Chooser = choose,
) -> dict[str, float]:
    """Return the bytes on the fullest rank, by use, of the chunk that takes most. The arguments are
    those of `plan_chunks`.
    """
    room = max(room or 0, whole.cached + whole.new)
    found = _memories(whole, profile, variant, chunk=chunk, room=room, chooser=chooser)
    return max(found, key=lambda memory: sum(memory.values()))


def _memories(
    whole: Forward,
    profile: HardwareProfile,
    variant: str,
    *,
    chunk: int,
    room: int,
    chooser: Chooser,
) -> Iterator[dict[str, float]]:
    """Yield what chunks all over the prompt take on the fullest rank."""
    for part in _sampled(whole, chunk):
        choice = chooser(variant, part, profile)
        yield memory_per_rank(choice.variant, replace(part, active=choice.active), profile, room)


def largest_chunk(
    whole: Forward,
    profile: HardwareProfile,
    limit: float,
    *,
    variant: str = AUTO,
    room: int | None = None,
    chooser: Chooser = choose,
) -> int:
    """Return the most tokens per chunk such that no rank ever needs more than `limit` bytes.

    That is all of the prompt's, or a multiple of `UNIT`; 0 if not even one `UNIT` fits. The other
    arguments are those of `plan_chunks`.
    """
    room = max(room or 0, whole.cached + whole.new)

    def fits(chunk: int) -> bool:
        given: Any = {"chunk": chunk, "room": room, "chooser": chooser}
        found = _memories(whole, profile, variant, **given)
        return all(sum(memory.values()) <= limit for memory in found)

    held = memory_per_rank("pass-kv", whole, profile, room)
    if held["process"] + held["weights"] + held["kv"] > limit:
        return 0
    if fits(whole.new):
        return whole.new
    low, high = 0, -(-whole.new // UNIT)  # `low` units fit, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * UNIT) else (low, middle)
    return low * UNIT


def efficient_chunk(
    whole: Forward,
    profile: HardwareProfile,
    *,
    variant: str = AUTO,
    chooser: Chooser = choose,
    least: int = UNIT,
) -> int:
    """Return the fewest tokens per chunk, `least` times a power of two, with which the prompt takes
    at most `SLOWER` times as long as in one piece; all of its tokens if there is no such number.
    """

    def seconds(chunk: int) -> float:
        parts = list(_sampled(whole, chunk))
        planned = [plan_chunk(p, profile, variant=variant, chooser=chooser) for p in parts]
        return whole.new * sum(p.seconds for p in planned) / sum(p.new for p in planned)

    one_piece, chunk = seconds(whole.new), least
    while chunk < whole.new and seconds(chunk) > SLOWER * one_piece:
        chunk *= 2
    return min(chunk, whole.new)


def auto_chunk(
    whole: Forward,
    profile: HardwareProfile,
    limit: float,
    *,
    variant: str = AUTO,
    room: int | None = None,
    chooser: Chooser = choose,
) -> int:
    """Return the tokens per chunk that "auto" stands for, 0 if no chunk fits.

    The largest chunk that fits into `limit` bytes per rank, but none that takes memory for nothing:
    at most an efficient one, or one that adds `SPARE` to weights and KV, whichever is larger; and
    as many chunks have about the same size. The arguments are those of `largest_chunk`.
    """
    room = max(room or 0, whole.cached + whole.new)
    held = memory_per_rank("pass-kv", whole, profile, room)
    spare = held["process"] + (1 + SPARE) * (held["weights"] + held["kv"])

    def largest(limit: float) -> int:
        return largest_chunk(whole, profile, limit, variant=variant, room=room, chooser=chooser)

    chunk = largest(min(limit, spare))
    if chunk < whole.new and spare < limit:
        least = max(UNIT, chunk)
        efficient = efficient_chunk(whole, profile, variant=variant, chooser=chooser, least=least)
        chunk = min(largest(limit), efficient) if efficient > chunk else chunk
    if not chunk:
        return 0
    count = -(-whole.new // chunk)
    return min(whole.new, -(-whole.new // (count * UNIT)) * UNIT)


def _parts(whole: Forward, chunk: int) -> Iterator[Forward]:
    """Yield the forward of each chunk."""
    for begin in range(0, whole.new, chunk):
        new = min(chunk, whole.new - begin)
        yield replace(whole, cached=whole.cached + begin, new=new)


def _sampled(whole: Forward, chunk: int) -> Iterator[Forward]:
    """Yield forwards of `chunk` tokens evenly spread over the prompt, from its beginning to its
    end: seconds and bytes grow evenly with the tokens cached.
    """
    chunk = min(chunk, whole.new)
    last = whole.new - chunk  # where the last one begins at most
    count = min(_SAMPLES, 1 + -(-last // chunk))
    for number in range(count):
        begin = last * number // max(1, count - 1)
        yield replace(whole, cached=whole.cached + begin, new=chunk)
