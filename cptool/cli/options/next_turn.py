"""What `cptool decode` adds to a session: a question in its conversation, or tokens as they are."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptool import units
from cptool.cli import draw
from cptool.cli.options.prompts import Prompt, Prompts
from cptool.distributed.environment import is_first_rank
from cptool.errors import UserError
from cptool.session.conversation import find_dialogues, open_answer
from cptool.session.dialogue import Dialogue
from cptool.session.manifest import Damaged, Manifest
from cptool.session.store import common_prefix

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
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

    def before_answers(self, manifest: Manifest) -> list[Sequence[int]]:
        """Return the tokens whose text each answer goes on with: those of an answer that was cut,
        none before one that begins; outside a conversation all.
        """
        held = [sequence.tokens for sequence in manifest.sequences]
        if self.chat is None:
            joined = zip(held, self.keep, self.prompts, strict=True)
            return [(*said[:kept], *new) for said, kept, new in joined]
        pairs = zip(held, self.chat, strict=True)
        return [() if d.answer is None else said[d.answer :] for said, d in pairs]


def next_turn(
    directory: Path, manifest: Manifest, checkpoint: "Checkpoint", asked: Prompts, *, raw: bool
) -> NextTurn:
    """Return what to compute next in a session.

    In a conversation, texts are the user's messages, unless `raw`; without any, the pending
    messages are answered and answers that were cut go on. What the template wrote otherwise before
    is computed again.
    """
    dialogues = _dialogues(directory, manifest, raw)
    tokenizer = checkpoint.tokenizer()
    texts_only = all(option in ("--prompt", "--prompt-file", "--file") for option, _ in asked.given)
    if dialogues is None or tokenizer is None or (asked and (raw or not texts_only)):
        _say_raw(directory, checkpoint, asked, raw=raw, was_chat=dialogues is not None)
        return _as_it_is(manifest, checkpoint, asked)
    if asked.parse:
        raise UserError(
            "--parse-control-tokens: the template of the conversation writes the control tokens; "
            "leave it out, or add --raw"
        )
    questions = [p.text for p in replace(asked, chat=bool(asked)).read(checkpoint, begin=False)]
    _check_number(len(questions), len(dialogues))
    turns = [
        _in_template(b, dialogue, manifest, tokenizer, question=questions[b] if questions else None)
        for b, dialogue in enumerate(dialogues)
    ]
    goes_on = bool(questions) or not all(sequence.ended for sequence in manifest.sequences)
    held = [sequence.tokens for sequence in manifest.sequences]
    keep = tuple(
        common_prefix(said, context) for said, (_, context) in zip(held, turns, strict=True)
    )
    return NextTurn(
        prompts=tuple(tuple(context[n:]) for (_, context), n in zip(turns, keep, strict=True)),
        keep=keep,
        chat=tuple(dialogue for dialogue, _ in turns) if goes_on else None,
    )


def begun(
    prompts: Sequence[Prompt], asked: Prompts, session: Path | None, manifest: Manifest | None
) -> tuple[Dialogue, ...] | None:
    """Return the conversations that `prefill --chat` begins in a session, None without --chat or
    where the session, if there is one, holds just these.
    """
    if session is None or not asked.chat:
        return None
    if any(prompt.text is None for prompt in prompts):
        _say(f"{session} is not a conversation, because not all of its prompts are texts")
        return None
    dialogues = tuple(Dialogue.begun(asked.system, prompt.text or "") for prompt in prompts)
    if manifest is not None:
        said = [list(sequence.tokens) for sequence in manifest.sequences]
        with contextlib.suppress(Damaged):  # then it is written anew
            if said == [p.tokens for p in prompts]:
                return None if find_dialogues(session, manifest) == dialogues else dialogues
    return dialogues


def _dialogues(directory: Path, manifest: Manifest, raw: bool) -> tuple[Dialogue, ...] | None:
    try:
        return find_dialogues(directory, manifest)
    except Damaged:
        if raw:
            return None
        raise


def _in_template(
    b: int, dialogue: Dialogue, manifest: Manifest, tokenizer: "Tokenizer", *, question: str | None
) -> tuple[Dialogue, Sequence[int]]:
    """Return the messages of sequence b and the tokens that it is to hold before it is answered."""
    sequence = manifest.sequences[b]
    if question is not None:
        dialogue = dialogue.asked(question)
    if dialogue.pending:
        return dialogue, tokenizer.chat(dialogue.dicts())
    if not sequence.ended:
        dialogue = open_answer(dialogue, sequence.tokens, tokenizer)
        if dialogue.answer is None:
            raise UserError(
                f"sequence {b + 1}: its last question was answered; give it the next one, as with "
                "--prompt"
            )
    return dialogue, sequence.tokens


def _as_it_is(manifest: Manifest, checkpoint: "Checkpoint", asked: Prompts) -> NextTurn:
    """Return the turn that appends the prompts' own tokens."""
    batch = len(manifest.sequences)
    sequences = asked.encode(checkpoint, begin=False)
    _check_number(len(sequences), batch)
    return NextTurn(
        prompts=tuple(map(tuple, sequences)) or ((),) * batch,
        keep=tuple(len(sequence.tokens) for sequence in manifest.sequences),
    )


def _check_number(prompts: int, batch: int) -> None:
    if prompts and prompts != batch:
        raise UserError(
            f"{units.some(prompts, 'prompt')} for a session of "
            f"{units.some(batch, 'sequence')}; give one for each, or none"
        )


def _say_raw(
    directory: Path, checkpoint: "Checkpoint", asked: Prompts, *, raw: bool, was_chat: bool
) -> None:
    """Say in one line that no template is used, where one could be expected."""
    if was_chat:
        _say(
            f"{directory} is not a conversation any more, because its tokens are continued as they "
            f"are; cptool session rollback {directory} takes that back"
        )
        return
    tokenizer = checkpoint.tokenizer()
    text = any(option.startswith("--prompt") for option, _ in asked.given)
    if text and not raw and tokenizer is not None and tokenizer.chat_template is not None:
        _say(
            f"{directory} is not a conversation, so the text is appended as it is; "
            "prefill --chat begins one, --raw leaves this line out"
        )


def _say(line: str) -> None:
    """Print a line on standard error, once for all ranks of a launcher."""
    if is_first_rank():
        draw.say(line)
