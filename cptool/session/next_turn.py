"""What the sequences of a session become with their next turn: messages in the template of their
conversations, or tokens as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cptool.errors import UserError
from cptool.session.conversation import open_answer
from cptool.session.dialogue import Dialogue, Message
from cptool.session.manifest import Sequence as Saved
from cptool.session.store import common_prefix
from cptool.units import some

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class NextTurn:
    """The fields of a `Turn` that say what each sequence becomes.

    prompts[b]: the tokens that follow the first `keep[b]` of sequence b. chat: its messages, if
    this is a conversation.
    """

    prompts: tuple[tuple[int, ...], ...]
    keep: tuple[int, ...]
    chat: tuple[Dialogue, ...] | None = None

    def fields(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {"prompts": self.prompts, "keep": self.keep, "chat": self.chat}

    def before_answers(self, saved: Sequence[Saved]) -> list[Sequence[int]]:
        """Return the tokens whose text each answer goes on with: those of an answer that was cut,
        none before one that begins; outside a conversation all.
        """
        held = [sequence.tokens for sequence in saved]
        if self.chat is None:
            joined = zip(held, self.keep, self.prompts, strict=True)
            return [(*said[:kept], *new) for said, kept, new in joined]
        pairs = zip(held, self.chat, strict=True)
        return [() if d.answer is None else said[d.answer :] for said, d in pairs]


def in_template(
    saved: Sequence[Saved],
    dialogues: Sequence[Dialogue],
    tokenizer: "Tokenizer",
    said: Sequence[Sequence[Message]] = (),
) -> NextTurn:
    """Return the turn that appends the messages `said[b]` to each conversation.

    Without any, the pending messages are answered and answers that were cut go on. What the
    template wrote otherwise before is computed again.
    """
    check_number(len(said), len(dialogues))
    turns = [
        _rendered(b, dialogue.extended(said[b] if said else ()), saved[b], tokenizer)
        for b, dialogue in enumerate(dialogues)
    ]
    keep = tuple(
        common_prefix(sequence.tokens, context)
        for sequence, (_, context) in zip(saved, turns, strict=True)
    )
    goes_on = bool(said) or not all(sequence.ended for sequence in saved)
    return NextTurn(
        prompts=tuple(tuple(context[n:]) for (_, context), n in zip(turns, keep, strict=True)),
        keep=keep,
        chat=tuple(dialogue for dialogue, _ in turns) if goes_on else None,
    )


def as_it_is(saved: Sequence[Saved], new: Sequence[Sequence[int]] = ()) -> NextTurn:
    """Return the turn that appends the tokens `new[b]` to each sequence, or none."""
    check_number(len(new), len(saved))
    return NextTurn(
        prompts=tuple(map(tuple, new)) or ((),) * len(saved),
        keep=tuple(len(sequence.tokens) for sequence in saved),
    )


def check_number(prompts: int, batch: int) -> None:
    """Raise UserError unless there is one prompt for each sequence, or none."""
    if prompts and prompts != batch:
        raise UserError(
            f"{some(prompts, 'prompt')} for a session of {some(batch, 'sequence')}; "
            "give one for each, or none"
        )


def _rendered(
    b: int, dialogue: Dialogue, saved: Saved, tokenizer: "Tokenizer"
) -> tuple[Dialogue, Sequence[int]]:
    """Return the messages of sequence b and the tokens that it is to hold before it is answered."""
    if dialogue.pending:
        return dialogue, tokenizer.chat(dialogue.dicts())
    if not saved.ended:
        dialogue = open_answer(dialogue, saved.tokens, tokenizer)
        if dialogue.answer is None:
            raise UserError(
                f"sequence {b + 1}: its last question was answered; give it the next one"
            )
    return dialogue, saved.tokens
