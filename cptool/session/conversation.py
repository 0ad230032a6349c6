"""A conversation as its messages, and the token ids that the model's chat template makes of them.

The template is the truth: the context of an answer is exactly its rendering of all messages. What
the ranks hold already is only a saving, worth the prefix that it has in common with that rendering.
So a template that rewrites earlier turns, an answer cut short, and text that tokenises otherwise
than the model wrote it are one case.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cptool.errors import UserError
from cptool.session import chat_file
from cptool.session.chat_state import fitting
from cptool.session.dialogue import SEPARATOR, Dialogue
from cptool.session.manifest import Damaged, Manifest

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer


class Conversation:
    """One sequence's messages, which may end in a user's that is not answered yet.

    `tokens` is what the ranks should hold of it: after an answer the context it was given in and
    the tokens said, whatever they are; after `attach` and `undo` the template's rendering of the
    messages.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        system: str | None = None,
        *,
        dialogue: Dialogue | None = None,
        tokens: Sequence[int] = (),
    ):
        self.dialogue = dialogue or Dialogue.begun(system)
        self.tokens = list(tokens)
        self._tokenizer = tokenizer
        self._documents: list[Dialogue] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages that the template is given."""
        return self.dialogue.dicts()

    def ask(self, question: str) -> list[int]:
        """Return the token ids of the context in which to answer `question`, which is not added
        yet.

        UserError where the template refuses the messages.
        """
        return self._tokenizer.chat(self.dialogue.asked(question).dicts())

    def answered(
        self, question: str, context: list[int], answer: list[int], *, ended: bool = True
    ) -> None:
        """Add a question and the tokens of its answer in the `context` that `ask` returned for
        it; not `ended` where the answer was cut.
        """
        if self.dialogue.pending:
            self._documents.append(self.dialogue)
        self.tokens = context + answer
        self.dialogue = self.dialogue.asked(question).answered(
            self.tokens, len(answer), self._tokenizer.decode, ended=ended
        )

    def attach(self, document: str) -> None:
        """Add a document to the user's message that the next question completes."""
        asked = self.dialogue.asked(document)
        tokens = self._tokenizer.chat(asked.dicts())
        if self.dialogue.pending:
            self._documents.append(self.dialogue)
        self.dialogue, self.tokens = asked, tokens

    def undo(self) -> str | None:
        """Take back the last question with its answer, or the last document, and return it; None if
        there is none.
        """
        messages = self.dialogue.messages
        asked = [i for i, (role, _) in enumerate(messages) if role == "user"]
        if not asked:
            return None
        before, content = messages[: asked[-1]], messages[asked[-1]][1]
        known = (d.messages[-1][1] for d in self._documents if d.messages[:-1] == before)
        joined = [text for text in known if content.startswith(text + SEPARATOR)]
        if joined:
            document = max(joined, key=len)
            before = (*before, ("user", document))
            content = content[len(document + SEPARATOR) :]
        self._take(Dialogue(before))
        return content

    def reset(self) -> None:
        """Drop everything but the system message."""
        system = self.dialogue.messages[:1]
        self._documents.clear()
        self._take(Dialogue(system if system and system[0][0] == "system" else ()))

    def _take(self, dialogue: Dialogue) -> None:
        """Go back to `dialogue`."""
        self.dialogue = dialogue
        said = any(role != "system" for role, _ in dialogue.messages)
        self.tokens = (
            self._tokenizer.chat(dialogue.dicts(), add_generation_prompt=dialogue.pending)
            if said
            else []
        )

    @staticmethod
    def read(directory: Path, manifest: Manifest, tokenizer: "Tokenizer") -> "Conversation":
        """Return the conversation of a session of one sequence. Raises UserError if it holds none,
        or several, or it is not as it was written.
        """
        dialogues = read_dialogues(directory, manifest)
        if len(dialogues) > 1:
            raise UserError(
                f"{directory} holds {len(dialogues)} conversations, one for each sequence; "
                f"continue them with: cptool decode {directory}"
            )
        found = Conversation(tokenizer, dialogue=dialogues[0], tokens=manifest.sequences[0].tokens)
        states = chat_file.read(directory)
        earlier = [states[seal].dialogues[0] for seal in manifest.chat]
        found._documents = [dialogue for dialogue in earlier if dialogue.pending]
        return found


def read_dialogues(directory: Path, manifest: Manifest) -> tuple[Dialogue, ...]:
    """Return the messages of each sequence of a session. Raises UserError if it is no conversation,
    or what it says is not what was written.
    """
    path = directory / chat_file.FILE
    go_on = f"continue it with: cptool decode {directory}"
    if not manifest.chat:
        raise UserError(f"{directory} holds no conversation; {go_on}")
    if not path.exists():
        raise Damaged(
            f"{directory} holds no conversation ({chat_file.FILE} is missing); {chat_file.REMEDY}"
        )
    found = find_dialogues(directory, manifest)
    if found is None:
        raise UserError(
            f"{path} does not tell what {directory} says (was it continued without the chat "
            f"template?); go back with: cptool session rollback {directory}, or go on with "
            "cptool decode"
        )
    return found


def find_dialogues(directory: Path, manifest: Manifest) -> tuple[Dialogue, ...] | None:
    """Return the messages of each sequence of a session, None if it is not a conversation, or not
    any more.

    Raises Damaged if its conversation is missing or not as it was written.
    """
    if not manifest.chat:
        return None
    states = chat_file.read(directory)
    if fault := chat_file.problems(directory, manifest.chat):
        raise Damaged(fault[0])
    tokens = [sequence.tokens for sequence in manifest.sequences]
    state = fitting([states[seal] for seal in manifest.chat], tokens)
    return None if state is None else state.dialogues


def open_answer(dialogue: Dialogue, tokens: Sequence[int], tokenizer: "Tokenizer") -> Dialogue:
    """Return `dialogue` with the place of the answer that `tokens` end in, where the session was
    written by a version that did not keep it.
    """
    if dialogue.pending or dialogue.answer is not None or not dialogue.messages:
        return dialogue
    context = tokenizer.chat(Dialogue(dialogue.messages[:-1]).dicts())
    start = len(context)
    if list(tokens[:start]) != context or start >= len(tokens):
        return dialogue
    said = tokenizer.decode(tokens[start:])
    return Dialogue(dialogue.messages, start if said == dialogue.messages[-1][1] else None)
