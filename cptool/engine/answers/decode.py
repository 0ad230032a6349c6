"""Decode: one token after another for a batch of sequences, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cptool.checkpoint.tokenizer.stops import StopStream
from cptool.engine.answers.logprobs import packed, packed_size, scored, unpacked
from cptool.engine.answers.records import AnswerOptions, Answers, Emit, TokenLogprob
from cptool.engine.answers.sampler import Sampler
from cptool.engine.drafts.drafter import Drafter

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.engine.drafts.small import SmallModel
    from cptool.engine.engine import Engine
    from cptool.engine.sampling import Sampling


def next_tokens(engine: Engine, sampling: Sampling) -> list[int]:
    """Return the token that follows each sequence, the same on every rank; append nothing."""
    batch = range(len(engine.tokens))
    return _agreed(engine, Sampler(sampling, engine.tokens), batch).tokens


def decode(
    engine: Engine,
    options: AnswerOptions,
    *,
    tokenizer: Tokenizer | None = None,
    emit: Emit | None = None,
    interrupted: Callable[[], bool] | None = None,
    variant: str | None = None,
    small: SmallModel | None = None,
) -> Answers:
    """Append an answer to each sequence of `engine` and return them. Collective.

    A sequence whose answer has ended takes no part until it is given new tokens, nor does an empty
    one. The KV of a sequence's last token stays pending, and that of drafts that did not come true
    is dropped.

    tokenizer: needed for stop texts; every rank sees by itself that one is complete.
    emit: called for each token as it is known.
    interrupted: called at each token; once it returns True on any rank, that token is the last
        one of every sequence, on all ranks.
    variant: used for these steps instead of the engine's.
    small: the model that drafts, if `options` request one.
    """
    answers = Answers.none(len(engine.tokens), options)
    limits = options.limits(len(engine.tokens))
    going = zip(engine.tokens, limits, engine.ended, strict=True)
    active = {b for b, (said, limit, ended) in enumerate(going) if said and limit and not ended}
    if active and engine.computed != [len(said) for said in engine.tokens]:
        engine.extend([[] for _ in engine.tokens], variant=variant)
    fixed = engine.fixed(variant, len(active))
    sampler = Sampler(options.sampling, engine.tokens, options.draws, engine.samples)
    stops = _stop_streams(engine, active, options, tokenizer)
    taking = _Taking(answers=answers, options=options, limits=limits, stops=stops, emit=emit)
    drafter = Drafter(engine, options, active, variant=fixed, small=small)
    answers.drafts = drafter.drafted
    fresh, waiting = active, {}  # what comes next is known; its logits are to be computed
    while fresh:
        engine.report("decode, token", max(map(len, answers.token_ids)), max(limits))
        stopping = interrupted is not None and interrupted()
        agreed = _agreed(engine, sampler, sorted(fresh), stopping=stopping, top=options.logprobs)
        picks, over, known = agreed.tokens, agreed.stopping, set()
        if interrupted is not None and engine.world.tp > 1:
            over = bool(engine.world.group.sum_of([int(over)])[0])
        for b in sorted(fresh):
            if how := taking.take(b, picks[b], agreed.scores.get(b)):
                answers.stopped[b] = how
            elif over:
                answers.stopped[b] = "interrupted"
            elif drafter.came(b, picks[b]):
                known.add(b)
            else:
                waiting[b] = picks[b]
        if over:
            for b in waiting:
                answers.stopped[b] = "interrupted"
            break
        fresh = known
        if not fresh and waiting:
            left = {b: limits[b] - len(answers.token_ids[b]) for b in sorted(waiting)}
            with drafter.step(waiting, left) as drafts:
                engine.advance(waiting, max(left.values()), variant=fixed, drafts=drafts)
            fresh, waiting = set(waiting), {}
    engine.settle()
    last = {b: answer[-1] for b, answer in enumerate(answers.token_ids) if answer}
    engine.conclude(last, ended=[b for b in last if answers.stopped[b] == "eos"])
    return answers


@dataclass(frozen=True, kw_only=True)
class _Taking:
    """Takes the tokens of answers as they are known."""

    answers: Answers
    options: AnswerOptions
    limits: Sequence[int]
    stops: Mapping[int, StopStream]
    emit: Emit | None

    def take(self, b: int, token: int, score: TokenLogprob | None) -> str | None:
        """Append a token to the answer of sequence b; return how the answer ended with it."""
        self.answers.append(b, token, score)
        if self.emit is not None:
            self.emit(b, token, score)
        if b in self.stops:
            self.stops[b].push(token)
        found = b in self.stops and self.stops[b].found
        return self.options.ended(self.answers.token_ids[b], self.limits[b], found=found)


def _stop_streams(
    engine: Engine, active: Collection[int], options: AnswerOptions, tokenizer: Tokenizer | None
) -> dict[int, StopStream]:
    """Return what finds the stop texts of each answer; nothing without such texts."""
    if not options.stop_texts:
        return {}
    if tokenizer is None:
        raise ValueError("`stop_texts` need a `tokenizer`")
    streams = {}
    for b in active:
        said = engine.tokens[b]
        after = said[len(said) - options.after[b] :] if options.after else []
        streams[b] = StopStream(tokenizer.stream(after), options.stop_texts)
    return streams


@dataclass(frozen=True, kw_only=True)
class _Agreed:
    """The next token of each sequence, 0 for those without, the same on every rank.

    stopping: whether a rank is to stop. scores: log-probabilities, where they were requested.
    """

    tokens: list[int]
    stopping: bool
    scores: dict[int, TokenLogprob]


def _agreed(
    engine: Engine,
    sampler: Sampler,
    active: Sequence[int],
    *,
    stopping: bool = False,
    top: int | None = None,
) -> _Agreed:
    """Return the next tokens of the `active` sequences, with `top` likeliest ones; in one message.

    A token is picked by the rank that holds its logits, and summed with zeros from the others.
    """
    picks, scores = [0] * len(engine.tokens), {}
    logits = {b: row for b, row in engine.logits.items() if b in active}
    with engine.trace.span("sampling", "sampling"):
        found = sampler.picks(logits)
        for b, pick in found.items():
            picks[b] = pick
        if top is not None and found:
            rows = torch.stack([logits[b] for b in found])
            scores = dict(zip(found, scored(rows, list(found.values()), top), strict=True))
    if engine.world.cp == 1:
        return _Agreed(tokens=picks, stopping=stopping, scores=scores)
    sizes = 0 if top is None else packed_size(top)
    numbers = [int(stopping), *picks]
    for b in active:
        numbers += packed(scores[b]) if b in scores else [0] * sizes
    with engine.trace.span("all-reduce", "exposed"):
        numbers = engine.world.cp_group.sum_of(numbers)
    stops, picks, rest = numbers[0], numbers[1 : 1 + len(picks)], numbers[1 + len(picks) :]
    if top is not None:
        scores = {
            b: unpacked(picks[b], rest[sizes * n : sizes * (n + 1)]) for n, b in enumerate(active)
        }
    return _Agreed(tokens=picks, stopping=bool(stops), scores=scores)
