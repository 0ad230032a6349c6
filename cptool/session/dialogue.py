"""The messages of one sequence, and where in its tokens the last answer begins."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Message = tuple[str, str]
"""Role and content."""

SEPARATOR = "\n\n"
"""Between a document and the question about it, which are one message."""

_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Dialogue:
    """Messages as the chat template is given them.

    answer: number of tokens before the answer that the sequence's tokens end in; None where they
        end in something else, such as a user's message.
    """

    messages: tuple[Message, ...] = ()
    answer: int | None = None

    @staticmethod
    def begun(system: str | None, *contents: str) -> "Dialogue":
        """Return a conversation that begins with an optional system message and the user's."""
        first = () if system is None else (("system", system),)
        return Dialogue((*first, *(("user", content) for content in contents)))

    @property
    def pending(self) -> bool:
        """Whether the last message is a user's, which is not answered yet."""
        return bool(self.messages) and self.messages[-1][0] == "user"

    @property
    def answers(self) -> int:
        """The number of answers."""
        return sum(role == "assistant" for role, _ in self.messages)

    def dicts(self) -> list[dict[str, str]]:
        """Return the messages as chat templates and the OpenAI format have them."""
        return [{"role": role, "content": content} for role, content in self.messages]

    def asked(self, text: str, role: str = "user") -> "Dialogue":
        """Return the conversation with one more message.

        Many templates insist that roles alternate, so a user's message joins one that is not
        answered yet, after a blank line.
        """
        if role == "user" and self.pending:
            document = self.messages[-1][1]
            return Dialogue((*self.messages[:-1], (role, document + SEPARATOR + text)))
        return Dialogue((*self.messages, (role, text)))

    def extended(self, messages: Sequence[Message]) -> "Dialogue":
        """Return the conversation with more messages, the first of which `asked` may join."""
        if not messages:
            return self
        (role, content), *others = messages
        dialogue = self.asked(content, role)
        return Dialogue((*dialogue.messages, *others))

    def answered(
        self, tokens: Sequence[int], new: int, decode: Callable[[list[int]], str], *, ended: bool
    ) -> "Dialogue":
        """Return the conversation once the last `new` of its `tokens` were generated.

        They begin an answer, or go on with the one that the tokens ended in. A character of which
        the last bytes are missing is left out of an answer that has not `ended`.
        """
        if not new:
            return self
        start = len(tokens) - new if self.answer is None else self.answer
        text = decode(list(tokens[start:]))
        before = self.messages if self.answer is None else self.messages[:-1]
        if not ended:
            text = text.rstrip(_REPLACEMENT)
        return Dialogue((*before, ("assistant", text)), start)

    def continues(self, other: "Dialogue") -> bool:
        """Return whether this is `other` with more said."""
        mine, theirs = self.messages, other.messages
        if not theirs or len(mine) < len(theirs):
            return not theirs
        (role, content), (their_role, their_content) = mine[len(theirs) - 1], theirs[-1]
        longer = (
            content.startswith(their_content)
            if role == "assistant"
            else content == their_content or content.startswith(their_content + SEPARATOR)
        )
        return mine[: len(theirs) - 1] == theirs[:-1] and role == their_role and longer
