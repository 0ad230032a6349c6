"""The state of a conversation: a session's messages after a turn, tied to its tokens."""

import hashlib
import json
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from cptool.session.dialogue import Dialogue, Message

Lengths = tuple[int, ...]
"""Tokens of each sequence."""


@dataclass(frozen=True)
class State:
    """The messages of each sequence of a batch, and the tokens that they belong to.

    tokens[b]: digest of the tokens of sequence b.
    lengths[b]: their number. Format 2 did not keep it, and knew one sequence: `lengths` is None.
    """

    tokens: tuple[str, ...]
    lengths: Lengths | None
    dialogues: tuple[Dialogue, ...]

    @staticmethod
    def of(tokens: Sequence[Sequence[int]], dialogues: Sequence[Dialogue]) -> "State":
        """Return the state of sequences with these tokens."""
        lengths = tuple(map(len, tokens))
        return State(digests(tokens, [lengths])[lengths], lengths, tuple(dialogues))

    def seal(self) -> str:
        """Return the checksum of everything in the state."""
        if self.lengths is None:
            return checksum(old_fields(self))
        spoken = [
            [d.answer, [_message_checksum(*message) for message in d.messages]]
            for d in self.dialogues
        ]
        return checksum([self.tokens, self.lengths, spoken])


@lru_cache(maxsize=4096)
def _message_checksum(role: str, content: str) -> str:
    """Return the checksum of a message, which many states share."""
    return checksum([role, content])


def old_fields(state: State) -> dict:
    """Return a state of format 2 as its file has it: a system message, questions and answers."""
    messages = state.dialogues[0].messages
    system = messages[0][1] if messages and messages[0][0] == "system" else None
    texts = [content for _, content in messages[system is not None :]]
    exchanges = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    return {"tokens": state.tokens[0], "system": system, "exchanges": exchanges}


def old_state(tokens: str, system: str | None, exchanges: Iterable[Sequence[str]]) -> State:
    """Return the state of these fields of format 2."""
    messages: list[Message] = [] if system is None else [("system", system)]
    for question, answer in exchanges:
        messages += [("user", question), ("assistant", answer)]
    return State((tokens,), None, (Dialogue(tuple(messages)),))


def checksum(value: object) -> str:
    """Return the SHA-256 of a value's JSON in hex digits."""
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()


def fitting(states: Iterable[State], tokens: Sequence[Sequence[int]]) -> State | None:
    """Return the last of `states` that belongs to exactly these tokens, None if none does."""
    own = State.of(tokens, ())
    old = None
    for state in reversed(list(states)):
        if state.lengths is None and len(tokens) == 1:
            old = old or old_digest(tokens[0])
            if state.tokens == (old,):
                return state
        if (state.lengths, state.tokens) == (own.lengths, own.tokens):
            return state
    return None


def digests(
    tokens: Sequence[Sequence[int]], lengths: Sequence[Lengths]
) -> dict[Lengths, tuple[str, ...]]:
    """Return the digests of the first `lengths[i][b]` tokens of each sequence b, for each i."""
    columns = []
    for b, said in enumerate(tokens):
        digest, done, at = hashlib.sha256(), 0, {}
        for length in sorted({each[b] for each in lengths}):
            numbers = array("i", said[done:length])
            if sys.byteorder == "big":
                numbers.byteswap()
            digest.update(numbers.tobytes())
            at[length], done = digest.hexdigest(), length
        columns.append(at)
    return {
        each: tuple(column[n] for column, n in zip(columns, each, strict=True)) for each in lengths
    }


def old_digest(tokens: Sequence[int]) -> str:
    """Return the digest of tokens that format 2 kept."""
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()
