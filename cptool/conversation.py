"""A conversation as its messages, and the token ids that the model's chat template makes of them.

The template is the truth: the context of an answer is exactly its rendering of all messages. What
the ranks hold already is only a saving, worth the prefix that it has in common with that rendering.
So a template that rewrites earlier turns, an answer cut short, and text that tokenises otherwise
than the model wrote it are one case.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cptool.errors import UserError

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer import Tokenizer

FORMAT = 1
FILE = "chat.json"
"""Where a session's messages are, beside its manifest."""


@dataclass(frozen=True)
class Exchange:
    question: str
    answer: str


class Conversation:
    """Questions and their answers, after an optional system message.

    `tokens` is what the ranks should hold of it: after an answer the context it was given in and
    the tokens said, whatever they are; after `undo` the template's rendering of the messages left.
    """

    def __init__(self, tokenizer: "Tokenizer", system: str | None = None):
        self.system = system
        self.exchanges: list[Exchange] = []
        self.tokens: list[int] = []
        self._tokenizer = tokenizer

    @property
    def messages(self) -> list[dict[str, str]]:
        """What the template is given."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for exchange in self.exchanges:
            messages.append({"role": "user", "content": exchange.question})
            messages.append({"role": "assistant", "content": exchange.answer})
        return messages

    def ask(self, question: str) -> list[int]:
        """Token ids of the context in which to answer `question`, which is not added yet.

        UserError where the template refuses the messages.
        """
        return self._tokenizer.chat([*self.messages, {"role": "user", "content": question}])

    def answered(self, question: str, context: list[int], answer: list[int]) -> None:
        """Adds a question and the tokens said in the `context` that `ask` gave for it."""
        self.exchanges.append(Exchange(question, self._tokenizer.decode(answer)))
        self.tokens = context + answer

    def undo(self) -> str | None:
        """Takes back the last question with its answer and returns it; None if there is none."""
        if not self.exchanges:
            return None
        taken = self.exchanges.pop()
        self.tokens = (
            self._tokenizer.chat(self.messages, add_generation_prompt=False)
            if self.exchanges
            else []
        )
        return taken.question

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.exchanges, self.tokens = [], []

    def write(self, directory: Path) -> None:
        """Puts the conversation on disk, before the session that it belongs to is committed.

        The state that the file held last stays beside the new one, and `read` takes that which fits
        the manifest: a kill between the two files loses nothing.
        """
        path = directory / FILE
        state = {
            "tokens": digest(self.tokens),
            "system": self.system,
            "exchanges": [[exchange.question, exchange.answer] for exchange in self.exchanges],
        }
        kept = (
            [old for old in _states(path)[-1:] if old["tokens"] != state["tokens"]]
            if path.exists()
            else []
        )
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, "states": [*kept, state]}, file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    @staticmethod
    def read(directory: Path, tokens: Sequence[int], tokenizer: "Tokenizer") -> "Conversation":
        """The conversation of a session that says `tokens`; UserError if it is not there."""
        path = directory / FILE
        if not path.exists():
            raise UserError(
                f"{directory} holds no conversation ({FILE} is missing); "
                f"continue it with: cptool decode {directory}"
            )
        state = next((state for state in _states(path) if state["tokens"] == digest(tokens)), None)
        if state is None:
            raise UserError(
                f"{path} does not tell what {directory} says (was it continued by cptool decode?); "
                f"go back with: cptool session rollback {directory}, or go on with cptool decode"
            )
        found = Conversation(tokenizer, state["system"])
        found.exchanges = [Exchange(question, answer) for question, answer in state["exchanges"]]
        found.tokens = list(tokens)
        return found


def digest(tokens: Sequence[int]) -> str:
    """A name for exactly these tokens."""
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()


def _states(path: Path) -> list[dict]:
    """The states in the file, the newest last."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise ValueError(f"it has format {fields['format']}, this cptool reads format {FORMAT}")
        for state in fields["states"]:
            texts = [
                state["tokens"],
                *(text for exchange in state["exchanges"] for text in exchange),
            ]
            known = state["system"] is None or isinstance(state["system"], str)
            if (
                not known
                or not all(isinstance(text, str) for text in texts)
                or any(len(e) != 2 for e in state["exchanges"])
            ):
                raise ValueError("a state of it has parts of the wrong type")
        return fields["states"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a readable conversation ({error}); restore it or remove it"
        ) from None
