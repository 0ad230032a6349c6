"""What a model answers: whole, or piece by piece."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.stops import StopStream
    from cptool.engine.answers.records import TokenLogprob


Tokens: TypeAlias = Generator[tuple[int, int], None, None]
"""Each token as it comes, after the index of its sequence."""

Keep: TypeAlias = "Callable[[list[Generation]], None]"
"""Takes the answers to a request, one per sequence."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What the model appended to one sequence.

    text: what the tokens add to the text before them, up to a stop text; None if the model has no
        tokenizer.
    token_ids: the tokens, those that end the answer included.
    prompt_tokens: number of tokens before them.
    stopped: how the answer ended: "eos" after a token that ends one, "stop" at a stop text,
        "length" at the limit of tokens, "interrupted" by the caller.
    logprobs: one for each token, if they were requested.
    prompt_logprobs: one for each of the last tokens before the answer, those that the call read, if
        they were requested.
    """

    text: str | None
    token_ids: tuple[int, ...]
    prompt_tokens: int
    stopped: str
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Piece:
    """The next part of an answer.

    text: whole characters; None if the model has no tokenizer. Together, the pieces' texts are the
        answer's.
    token_ids: the tokens since the piece before.
    """

    text: str | None
    token_ids: tuple[int, ...]


class Stream(Iterator[Piece]):
    """An iterator of the pieces of one answer; a context manager that closes it.

    The ranks generate ahead of what is read. Closed before its end, by `close`, at the end of a
    `with` block or when it is garbage collected, a stream stops the answer within a token, or
    within a layer of its prompt. Until it has ended or is closed, other threads' calls of this
    LLM wait, and those of the thread that reads it are refused.

    result: the whole answer once it has ended; what there is of it once it was closed; None
        before, and if nothing was generated.
    """

    def __init__(self, tokens: Tokens, results: list[Generation], text: StopStream | None) -> None:
        """tokens: generates the answer, and puts it into `results` at the end, however it comes."""
        self._results = results
        self._pieces = _read(tokens, results, text)

    def __next__(self) -> Piece:
        return next(self._pieces)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the answer if it has not ended, and block until the ranks have stopped."""
        self._pieces.close()

    @property
    def result(self) -> Generation | None:
        return self._results[0] if self._results else None


def _read(
    tokens: Tokens, results: list[Generation], text: StopStream | None
) -> Generator[Piece, None, None]:
    """Yield the pieces. Not a method: a cycle would keep a stream that is left from being closed
    at once.
    """
    held: list[int] = []  # tokens whose text is not complete
    with contextlib.closing(tokens):
        for _, token in tokens:
            held.append(token)
            said = text.push(token) if text else None
            if said != "":
                yield Piece(said, tuple(held))
                held.clear()
    if held and text:
        yield Piece(text.flush(ended=is_whole(results[0].stopped)), tuple(held))


def is_whole(stopped: str) -> bool:
    """Return whether an answer that ended so goes on nowhere, so that a character which lacks bytes
    is U+FFFD in its text. Otherwise the tokens to come may complete it.
    """
    return stopped == "eos"
