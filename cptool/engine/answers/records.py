"""What answers are made by, and what becomes of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cptool.engine.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How tokens are chosen, where answers end, and what is reported of their tokens.

    limit: the most tokens of an answer, or of the answers to each prompt.
    draws: the index that each prompt's draws depend on; by default its place in the batch.
    stop_ids: tokens that end an answer, as its last one.
    stop_texts: an answer ends with the token that completes one of them in its text, within a token
        or across several. Texts of the prompt, and control tokens, do not count.
    stop_tokens: tokens that end an answer as stop texts do, so that the next turn may go on.
    after: how many of the last tokens of each sequence the answer's text goes on with, which
        matters for a character that they share; by default none.
    logprobs: report the log-probability of each token, and this many of the likeliest tokens in its
        place; None for no report. See `TokenLogprob`.
    draft: where tokens are drafted from (`cptool.engine.drafts.names`). The answers are the same
        whichever it is.
    """

    limit: int | tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    draws: tuple[int, ...] | None = None
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    after: tuple[int, ...] | None = None
    logprobs: int | None = None
    draft: str = "off"

    def limits(self, batch: int) -> tuple[int, ...]:
        """Return the most tokens of the answer of each of `batch` sequences."""
        limits = (self.limit,) if isinstance(self.limit, int) else self.limit
        return tuple(limit for limit in limits for _ in range(batch // len(limits)))

    def ended(self, answer: Sequence[int], limit: int, *, found: bool) -> str | None:
        """Return how an answer has ended with its last token, None if it goes on (see `Answers`).

        found: whether that token completed a stop text.
        """
        if not answer:
            return None
        if answer[-1] in self.stop_ids:
            return "eos"
        if found or answer[-1] in self.stop_tokens:
            return "stop"
        return "length" if len(answer) == limit else None


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and the `top` likeliest tokens in its place, likeliest first.

    These are natural logarithms under the model's own distribution: log-softmax, in float32, of its
    logits before any bias, penalty, temperature or truncation. None for the first token of a
    sequence, which nothing comes before.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]

    def fields(self) -> dict[str, object]:
        """Return the fields of JSON: `top` as [id, log-probability] pairs."""
        return {"token": self.token, "logprob": self.logprob, "top": [list(t) for t in self.top]}


Emit = Callable[[int, int, "TokenLogprob | None"], None]
"""Takes each token as it is known, as emit(sequence, token, score), `score` if log-probabilities
were requested.
"""

Logprobs = tuple[tuple[TokenLogprob, ...], ...]
"""Of each sequence, one for each token."""


@dataclass(kw_only=True)
class Drafted:
    """What became of drafts.

    asked: where from (`cptool.engine.drafts.names`). off: why nothing was drafted; None if it could
        be.
    steps: forwards after those of the prompts. proposed: tokens that were computed in them before
        they were known. accepted: those that came true, and so took no step of their own.
    """

    asked: str = "off"
    off: str | None = None
    steps: int = 0
    proposed: int = 0
    accepted: int = 0

    def fields(self) -> dict[str, Any]:
        """Return the fields of JSON."""
        return {
            "draft": self.asked,
            "draft_off": self.off,
            "steps": self.steps,
            "drafted_tokens": self.proposed,
            "accepted_tokens": self.accepted,
        }

    def add(self, other: Drafted) -> None:
        """Count what became of the drafts of another batch as well."""
        self.off = self.off or other.off
        self.steps += other.steps
        self.proposed += other.proposed
        self.accepted += other.accepted

    def tokens_per_step(self, tokens: Sequence[Sequence[int]]) -> float | None:
        """Return the tokens of answers after their first ones, per step; None without steps."""
        further = sum(max(0, len(answer) - 1) for answer in tokens)
        return further / self.steps if self.steps else None


@dataclass(kw_only=True)
class Answers:
    """What was appended to each sequence.

    token_ids: the tokens, the one that ended the answer included.
    stopped: how each answer ended: "eos" with a token of `stop_ids`, or, without tokens, because it
        had ended before; "stop" with a stop text or stop token, "length" at the limit,
        "interrupted" on request.
    logprobs: those of the tokens, if they were requested.
    drafts: what became of drafts.
    """

    token_ids: list[list[int]]
    stopped: list[str]
    logprobs: list[list[TokenLogprob]] | None = None
    drafts: Drafted = field(default_factory=Drafted)

    @staticmethod
    def none(batch: int, options: AnswerOptions) -> Answers:
        """Return those of `batch` sequences before their first tokens."""
        return Answers(
            token_ids=[[] for _ in range(batch)],
            stopped=["eos" if limit else "length" for limit in options.limits(batch)],
            logprobs=None if options.logprobs is None else [[] for _ in range(batch)],
        )

    def append(self, b: int, token: int, score: TokenLogprob | None) -> None:
        """Append a token to the answer of sequence b."""
        self.token_ids[b].append(token)
        if self.logprobs is not None and score is not None:
            self.logprobs[b].append(score)

    def fields(self) -> dict[str, Any]:
        """Return the fields by name, with tuples for lists."""
        scores = None if self.logprobs is None else tuple(map(tuple, self.logprobs))
        tokens = tuple(map(tuple, self.token_ids))
        ends = tuple(self.stopped)
        return {"token_ids": tokens, "stopped": ends, "logprobs": scores, "drafts": self.drafts}
