"""Decode: one token after another for a batch of sequences, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from cptool.engine.answers.sampler import Sampler

if TYPE_CHECKING:
    from cptool.engine.engine import Engine
    from cptool.engine.sampling import Sampling


def next_tokens(engine: Engine, sampling: Sampling) -> list[int]:
    """Return the token that follows each sequence, the same on every rank; append nothing."""
    return _agreed(engine, Sampler(sampling, engine.tokens), range(len(engine.tokens)))[0]


def decode(
    engine: Engine,
    limit: int | Sequence[int],
    sampling: Sampling,
    stop: Sequence[int] = (),
    *,
    draws: Sequence[int] | None = None,
    emit: Callable[[int, int], None] | None = None,
    interrupted: Callable[[], bool] | None = None,
    variant: str | None = None,
) -> list[list[int]]:
    """Append up to `limit` tokens to each sequence of `engine`, or limit[b] to sequence b, and
    return them. Collective.

    A sequence that generates a token of `stop` keeps it and leaves the batch until it is given
    new tokens. An empty sequence takes no part. The KV of a sequence's last token stays pending.

    draws: as for `Sampler`.
    emit: called as emit(sequence, token) for each token as it is known.
    interrupted: called at each token; once it returns True on any rank, that token is the last
        one of every sequence, on all ranks.
    variant: used for these steps instead of the engine's.
    """
    answers: list[list[int]] = [[] for _ in engine.tokens]
    limits = [limit] * len(answers) if isinstance(limit, int) else limit
    going = zip(engine.tokens, limits, engine.ended, strict=True)
    active = {b for b, (said, most, ended) in enumerate(going) if said and most and not ended}
    if active and engine.computed != [len(said) for said in engine.tokens]:
        engine.extend([[] for _ in engine.tokens], variant=variant)
    sampler = Sampler(sampling, engine.tokens, draws)
    while active:
        engine.report("decode, token", max(map(len, answers)), max(limits))
        stopping = interrupted is not None and interrupted()
        picks, over = _agreed(engine, sampler, active, stopping=stopping)
        if interrupted is not None and engine.world.tp > 1:
            over = bool(engine.world.group.sum_of([int(over)])[0])
        for b in sorted(active):
            answers[b].append(picks[b])
            if emit is not None:
                emit(b, picks[b])
            if over or picks[b] in stop or len(answers[b]) == limits[b]:
                active.remove(b)
        left = max((limits[b] - len(answers[b]) for b in active), default=0)
        engine.advance({b: picks[b] for b in sorted(active)}, left, variant=variant)
    engine.settle()
    engine.conclude({b: answer[-1] for b, answer in enumerate(answers) if answer}, stop)
    return answers


def _agreed(
    engine: Engine, sampler: Sampler, active: Collection[int], *, stopping: bool = False
) -> tuple[list[int], bool]:
    """Return the next token of each sequence, 0 of those that are not `active`, and whether a rank
    is `stopping`; the same on every rank.
    """
    # Each is picked by the rank that holds its logits, and summed with zeros from the others.
    picks = [0] * len(engine.tokens)
    logits = {b: row for b, row in engine.logits.items() if b in active}
    with engine.trace.span("sampling", "sampling"):
        for b, pick in sampler.picks(logits).items():
            picks[b] = pick
    if engine.world.cp == 1:
        return picks, stopping
    with engine.trace.span("all-reduce", "exposed"):
        *picks, stops = engine.world.cp_group.sum_of([*picks, int(stopping)])
    return picks, bool(stops)
