"""What `cptool decode` adds to a session: a question in its conversation, or tokens as they are."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cptool.cli import draw
from cptool.cli.options.prompts import Prompt, Prompts
from cptool.distributed.environment import is_first_rank
from cptool.errors import UserError
from cptool.session.conversation import find_dialogues
from cptool.session.dialogue import Dialogue
from cptool.session.manifest import Damaged, Manifest
from cptool.session.next_turn import NextTurn, as_it_is, in_template

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint


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
        return as_it_is(manifest.sequences, asked.encode(checkpoint, begin=False))
    if asked.parse:
        raise UserError(
            "--parse-control-tokens: the template of the conversation writes the control tokens; "
            "leave it out, or add --raw"
        )
    read = replace(asked, chat=bool(asked)).read(checkpoint, begin=False)
    questions = [[("user", prompt.text or "")] for prompt in read]
    return in_template(manifest.sequences, dialogues, tokenizer, questions)


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
