"""Reading a prompt: a sequence of forwards, each over a chunk of its tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cptool.engine.answers.logprobs import PromptScores
from cptool.engine.prefill import chunks
from cptool.engine.prefill.auto import chunk_for
from cptool.engine.prefill.course import Course
from cptool.engine.reading import silent
from cptool.errors import Interrupted

if TYPE_CHECKING:
    from cptool.engine.answers.records import Logprobs
    from cptool.engine.engine import Engine


@dataclass(kw_only=True)
class Read:
    """How a prompt was read.

    chunk: the most new tokens of a forward. chunks: how many forwards there were. variants: how
    many of them under each variant, in the order of their first use. scores: log-probabilities of
    the new tokens on rank 0, if they were requested.
    """

    chunk: int
    chunks: int = 0
    variants: Counter[str] = field(default_factory=Counter)
    scores: Logprobs | None = None

    def fields(self) -> dict[str, Any]:
        """Return the fields of a `Report`."""
        return {
            "chunk": self.chunk,
            "chunks": self.chunks,
            "variants": dict(self.variants),
            "prompt_logprobs": self.scores,
        }


def read(
    engine: Engine,
    new: Sequence[Sequence[int]],
    top: int | None = None,
    *,
    answer: int = 0,
    between: Callable[[], None] | None = None,
    chunk: int | None = None,
    scored_from: Sequence[int] | None = None,
) -> Read:
    """Compute the pending tokens of each sequence and then `new[b]`, chunk by chunk, and leave
    what follows in `engine.logits`. Collective.

    The tokens are the same as in one piece; sums may differ in their rounding. Each chunk has a
    variant of its own. Room for all KV is made once, before the first chunk.

    top: return log-probabilities of the new tokens, and of as many likeliest ones in their place.
        The first token of a sequence has none.
    answer: keep room for that many further tokens of each sequence.
    between: called on every rank after each chunk but the last.
    chunk: what `chunk_for` has returned for this prompt, if the caller needed it.
    scored_from: with `top`, the first of `new[b]` whose log-probability is wanted.

    Raises Interrupted on all ranks if the launching process requests a stop. The chunks that were
    computed stay; the rest of the prompt is pending, or is not there if the first was under way.
    """
    prompt = list(map(list, new))
    scores = None if top is None else PromptScores(engine, prompt, top, scored_from)
    held = zip(engine.tokens, prompt, engine.computed, strict=True)
    left = [len(said) + len(more) - done for said, more, done in held]
    most = chunk or chunk_for(engine, left, engine.computed, answer=answer)
    several = chunks.count(left, most) > 1
    if several:
        engine.make_room(chunks.room(left, most, ranks=engine.world.cp, answer=answer))
    course = None
    if several and engine.report is not silent:
        course = Course.of(engine, left, most)
    done = Read(chunk=most)
    for lengths in chunks.cut(left, most):
        if done.chunks:
            if engine.world.agree_to_stop():
                raise Interrupted
            if between is not None:
                between()
        stops = [n + more for n, more in zip(engine.computed, lengths, strict=True)]
        engine.extend(
            [[] for _ in prompt] if done.chunks else prompt,
            reserve=0 if several else answer,
            until=stops if several else None,
            seen=None if scores is None else scores.score,
            course=course,
        )
        assert engine.choice is not None  # there was something to compute
        done.chunks += 1
        done.variants[engine.choice.variant] += 1
    if scores is not None:
        done.scores = scores.gathered()
    return done
