"""Prompts as Python programs give them: texts, token ids, chat messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from numbers import Integral
from operator import index
from typing import TYPE_CHECKING, TypeAlias, cast

from cptool.errors import UserError
from cptool.session import dialogue

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer

Message: TypeAlias = Mapping[str, str]
"""A chat message: {"role": "user", "content": "..."}."""

Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message]"
"""A text, token ids taken as they are, or chat messages for the model's own template."""


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """Return the model's tokenizer. Raises UserError if it has none."""
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise UserError(f"{checkpoint.path} has no tokenizer; give token ids")
    return tokenizer


def check_listed(prompts: Sequence[Prompt]) -> None:
    """Raise UserError for a single prompt in place of a list of them."""
    single = isinstance(prompts, (str, Mapping))
    if single or any(isinstance(prompt, (Mapping, Integral)) for prompt in prompts):
        raise UserError("`prompts` must be a list, with one prompt per sequence; add brackets")


def is_messages(prompt: Prompt) -> bool:
    """Return whether a prompt is chat messages."""
    some = not isinstance(prompt, str) and isinstance(prompt, Sized) and bool(len(prompt))
    return some and isinstance(prompt[0], Mapping)


def encoded(prompts: Sequence[Prompt], checkpoint: Checkpoint, *, begin: bool) -> list[list[int]]:
    """Return the token ids of each prompt; `begin`: texts take the BOS that the model uses.

    Raises UserError, with the prompt's number, for one that is empty or not of the vocabulary.
    """
    check_listed(prompts)
    rows = []
    for number, prompt in enumerate(prompts, 1):
        try:
            rows.append(_ids(prompt, checkpoint, begin))
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from None
    return rows


def before_answers(
    prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]]
) -> list[Sequence[int]]:
    """Return the tokens whose text each answer goes on with: those of the prompt, and none after
    messages, where the answer begins.
    """
    pairs = zip(prompts, tokens, strict=True)
    return [() if is_messages(prompt) else ids for prompt, ids in pairs]


def messages_of(prompts: Sequence[Prompt]) -> list[list[dialogue.Message]]:
    """Return the messages of each prompt, which a conversation goes on with: a text is the user's.

    Raises UserError for token ids, and for messages that a conversation cannot keep or answer.
    """
    check_listed(prompts)
    rows = []
    for number, prompt in enumerate(prompts, 1):
        try:
            rows.append(_messages(prompt))
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from None
    return rows


def _ids(prompt: Prompt, checkpoint: Checkpoint, begin: bool) -> list[int]:
    from cptool.checkpoint.tokenizer.input_checks import check_ids

    if isinstance(prompt, str):
        ids = tokenizer_of(checkpoint).encode(prompt, bos=begin) if prompt else []
    elif is_messages(prompt):
        ids = tokenizer_of(checkpoint).chat(cast("Sequence[Message]", prompt))
    else:
        try:
            ids = [index(token) for token in cast("Sequence[int]", prompt)]
        except TypeError:
            rule = "it must be a text, a list of token ids, or a list of chat messages"
            raise UserError(rule) from None
    if not ids:
        raise UserError("it is empty; give at least one token")
    check_ids(ids, checkpoint.config.vocab_size)
    return ids


def _messages(prompt: Prompt) -> list[dialogue.Message]:
    if isinstance(prompt, str):
        if not prompt:
            raise UserError("it is empty; give at least one character")
        return [("user", prompt)]
    if not is_messages(prompt):
        raise UserError(
            "token ids do not go into the template of a conversation; give a text or messages, or "
            "`raw` to append them as they are, which ends the conversation"
        )
    rows = []
    for message in cast("Sequence[Message]", prompt):
        if set(message) != {"role", "content"} or not all(
            isinstance(value, str) for value in message.values()
        ):
            raise UserError(
                f"a message of a session has a `role` and a `content`, both texts, not {message!r}"
            )
        rows.append((message["role"], message["content"]))
    if rows[-1][0] != "user":
        raise UserError("the last message must be a user's, which the model answers")
    return rows
