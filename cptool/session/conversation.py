"""A conversation as its messages, and the token ids that the model's chat template makes of them.

The template is the truth: the context of an answer is exactly its rendering of all messages. What
the ranks hold already is only a saving, worth the prefix that it has in common with that rendering.
So a template that rewrites earlier turns, an answer cut short, and text that tokenises otherwise
than the model wrote it are one case.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cptool.errors import UserError
from cptool.session import chat_file
from cptool.session.manifest import Damaged, Manifest

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer


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
        """The messages that the template is given."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for exchange in self.exchanges:
            messages.append({"role": "user", "content": exchange.question})
            messages.append({"role": "assistant", "content": exchange.answer})
        return messages

    def ask(self, question: str) -> list[int]:
        """Return the token ids of the context in which to answer `question`, which is not added
        yet.

        UserError where the template refuses the messages.
        """
        return self._tokenizer.chat([*self.messages, {"role": "user", "content": question}])

    def answered(self, question: str, context: list[int], answer: list[int]) -> None:
        """Add a question and the tokens of its answer in the `context` that `ask` returned for
        it.
        """
        self.exchanges.append(Exchange(question, self._tokenizer.decode(answer)))
        self.tokens = context + answer

    def undo(self) -> str | None:
        """Take back the last question with its answer and return it; None if there is none."""
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
        """Drop everything but the system message."""
        self.exchanges, self.tokens = [], []

    def state(self) -> dict:
        """Return what `cptool.session.chat_file` keeps beside a session of these tokens."""
        return {
            "tokens": chat_file.digest(self.tokens),
            "system": self.system,
            "exchanges": [[exchange.question, exchange.answer] for exchange in self.exchanges],
        }

    @staticmethod
    def read(directory: Path, manifest: Manifest, tokenizer: "Tokenizer") -> "Conversation":
        """Return the conversation of a session. Raises UserError if it is missing or not as it was
        written.
        """
        path = directory / chat_file.FILE
        if not manifest.chat:
            raise UserError(
                f"{directory} holds no conversation; continue it with: cptool decode {directory}"
            )
        if not path.exists():
            raise UserError(
                f"{directory} holds no conversation ({chat_file.FILE} is missing); "
                f"continue it with: cptool decode {directory}"
            )
        states = chat_file.read(directory)
        if fault := chat_file.problems(directory, manifest.chat):
            raise Damaged(fault[0])
        tokens = manifest.sequences[0].tokens
        said = chat_file.digest(tokens)
        found = [states[seal] for seal in manifest.chat if states[seal]["tokens"] == said]
        if not found:
            raise UserError(
                f"{path} does not tell what {directory} says (was it continued by cptool decode?); "
                f"go back with: cptool session rollback {directory}, or go on with cptool decode"
            )
        conversation = Conversation(tokenizer, found[-1]["system"])
        conversation.exchanges = [Exchange(*exchange) for exchange in found[-1]["exchanges"]]
        conversation.tokens = list(tokens)
        return conversation
