"""Log-probabilities of given tokens, without generating any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cptool.checkpoint.tokenizer.input_checks import check_ids
from cptool.engine.answers.records import AnswerOptions, TokenLogprob
from cptool.engine.requests import Continue
from cptool.errors import RunError, UserError

if TYPE_CHECKING:
    from cptool.llm.llm import LLM


def scores(
    llm: LLM, sequences: Sequence[Sequence[int]], *, first: Sequence[int], top: int = 0
) -> list[tuple[TokenLogprob, ...]]:
    """Return the log-probabilities of the tokens of each sequence from index `first[b]` on, each
    given all before it, and the `top` likeliest in their places. The sequences are read as one
    batch.

    Of a sequence, all tokens but the last must fit in the context.

    Raises UserError for a sequence that is empty, too long or not of the model's vocabulary.
    """
    config = llm.checkpoint.config
    for number, tokens in enumerate(sequences, 1):
        if not 0 < len(tokens) <= config.max_position_embeddings + 1:
            raise UserError(
                f"sequence {number} has {len(tokens):,} tokens; it must have 1 to the model's "
                f"context of {config.max_position_embeddings:,} and one more"
            )
        check_ids(tokens, config.vocab_size)
    request = Continue(
        tokens=tuple(map(tuple, sequences)),
        options=AnswerOptions(limit=0),
        prompt_logprobs=top,
        scored_from=tuple(first),
        fresh=True,
    )
    answer = llm._call(lambda ranks: ranks.answer(request, lambda *_: None))
    if answer.prompt_logprobs is None:
        raise RunError("this LLM was closed while it read; make another one")
    return [row[at:] for row, at in zip(answer.prompt_logprobs, first, strict=True)]
