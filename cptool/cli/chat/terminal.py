"""The commands of `cptool chat`, and the answers to its questions."""

import shlex
import sys
import time
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cptool.checkpoint.tokenizer.library import LimitError
from cptool.checkpoint.tokenizer.stops import StopStream
from cptool.cli import draw
from cptool.cli.answers.stopping import stopping
from cptool.cli.options.models import check_room, say_reading
from cptool.cli.progress import drawn_bar
from cptool.distributed.failure import RankFailed
from cptool.errors import RunError, UserError, as_options
from cptool.files import expanded
from cptool.session.conversation import Conversation
from cptool.units import duration, some, token_rate

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.engine.answers.records import TokenLogprob
    from cptool.engine.resident import Resident
    from cptool.engine.sampling import Sampling

HELP = """\
/save [DIR]  keep the conversation and its KV in DIR, which cptool chat DIR
             continues; a chat that continues a session saves at its end
/file PATH   put a text file before the next question
/retry       answer the last question again, with other draws
/undo        take back the last question and its answer
/reset       start over
/exit        end, as Ctrl-D does
//...        ask something that begins with /...
Ctrl-C stops an answer; what was written of it stays in the conversation.
A question that is still being read is taken back. A second Ctrl-C ends the
chat. Where you type, Ctrl-C clears the line and ends nothing."""


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How questions are answered: in at most `count` tokens each, up to a stop text or token;
    `dtype` is that of the KV.
    """

    tokenizer: "Tokenizer"
    sampling: "Sampling"
    count: int
    dtype: str
    stop_texts: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    draft: str = "off"


class Terminal:
    """Executes the user's lines.

    `saved` is the directory of the session that the ranks continue and its revision, None before
    the first /save.
    """

    def __init__(
        self,
        resident: "Resident",
        checkpoint: "Checkpoint",
        conversation: Conversation,
        answering: Answering,
    ) -> None:
        self.resident, self.checkpoint, self.conversation = resident, checkpoint, conversation
        self.answering = answering
        self.tokenizer = answering.tokenizer
        self.stop_ids = tuple(dict.fromkeys((*checkpoint.eos_ids, *self.tokenizer.turn_ends)))
        self.saved: tuple[Path, int] | None = None
        self._kept = conversation.dialogue
        self._retries = 0

    def continue_session(self, directory: Path, revision: int) -> None:
        """Let the end of the chat, and /save without a directory, continue this session."""
        self.saved, self._kept = (directory, revision), self.conversation.dialogue
        draw.say(
            f"{directory}: {some(self.conversation.dialogue.answers, 'answer')}, "
            f"{len(self.conversation.tokens):,} tokens so far"
        )
        if self.conversation.dialogue.pending:
            draw.say("the last message has no answer yet; your next question joins it")

    def converse(self, lines: Iterable[str]) -> None:
        """Execute lines until one ends the chat, and save what was said (`end`)."""
        for line in lines:
            if not self.handle(line):
                break
        self.end()

    def handle(self, line: str) -> bool:
        """Execute a line; return False if it ends the chat.

        A text of several lines, such as one that was pasted, is a question, whatever it begins
        with. A mistake is reported and changes nothing.
        """
        command, _, argument = line.strip().partition(" ")
        commands = {
            "/save": self.save,
            "/file": self.file,
            "/retry": self.retry,
            "/undo": self.undo,
            "/reset": self.reset,
            "/help": self.help,
        }
        try:
            if "\n" in line:
                self.ask(line)
            elif command == "/exit":
                return False
            elif command in commands:
                commands[command](argument.strip())
            elif command.startswith("/") and not command.startswith("//"):
                raise UserError(
                    f"{command} is not a command; /help lists them, and //... sends what begins "
                    "with /"
                )
            elif line.strip():
                self.ask(line.removeprefix("/") if line.startswith("//") else line)
        except LimitError:  # What takes too much goes on taking it until the program ends.
            raise
        except UserError as error:
            draw.say(as_options(str(error)), always=True)
        return True

    def ask(self, question: str, retries: int = 0) -> None:
        """Write the answer on standard output as it comes, and its rates on standard error.

        retries: how often it was answered before; the draws depend on it.
        """
        from cptool.engine.answers.records import AnswerOptions
        from cptool.engine.requests import Continue

        self._retries = retries
        context = self.conversation.ask(question)
        limit = self.checkpoint.config.max_position_embeddings
        room = min(self.answering.count, limit - len(context))
        if room < 1:
            raise UserError(
                f"the context is full: with this question it has {len(context):,} tokens, "
                f"the model's limit is {limit:,}; "
                "nothing was lost: ask something shorter, /save, /undo or /reset"
            )
        answering, sampling = self.answering, self.answering.sampling
        text = StopStream(self.tokenizer.stream(), answering.stop_texts)
        ids: list[int] = []
        began = first = time.perf_counter()

        def emit(sequence: int, token: int, score: "TokenLogprob | None") -> None:
            nonlocal first
            if not ids:
                first = time.perf_counter()
            ids.append(token)
            _write(text.push(token))

        with drawn_bar("") as bar, stopping(self.resident) as stopped:
            request = Continue(
                tokens=(tuple(context),),
                options=AnswerOptions(
                    limit=room,
                    sampling=replace(sampling, seed=sampling.seed + retries),
                    stop_ids=self.stop_ids,
                    stop_texts=answering.stop_texts,
                    stop_tokens=answering.stop_tokens,
                    draft=answering.draft,
                ),
            )
            answer = self.resident.answer(request, bar.before(emit), bar.watch)
            ended = time.perf_counter()
        if not ids and stopped():
            draw.say("\n(stopped while the question was read; it is as if it was not asked)")
            return
        said = list(answer.token_ids[0])
        how = answer.stopped[0]
        whole = how == "eos"
        # Of an answer that was cut, a character that lacks bytes is no part of the message either.
        _write(text.flush(ended=whole) + "\n")
        self.conversation.answered(question, context, said, ended=whole)
        drafts = answer.drafts
        drafted = f" ({drafts.accepted:,} drafted)" if drafts.accepted else ""
        rate = f", then {token_rate((len(ids) - 1) / (ended - first))}" if len(ids) > 1 else ""
        cut = {"length": ", cut at the limit of tokens", "interrupted": ", stopped"}.get(how, "")
        draw.say(
            f"[{some(len(ids), 'token')}{drafted}{cut}; "
            f"{answer.reused[0]:,} of {len(context):,} reused; "
            f"first after {duration(first - began)}{rate}; "
            f"{len(self.conversation.tokens):,} of {limit:,} in context]"
        )

    def save(self, argument: str) -> None:
        from cptool import files
        from cptool.engine.requests import Save
        from cptool.session import store

        if not argument and self.saved is None:
            raise UserError("/save: name a directory to keep the conversation in: /save DIR")
        if not self.conversation.tokens:
            raise UserError("/save: nothing was said yet; ask something first")
        directory = self.saved[0] if self.saved and not argument else expanded(argument)
        if self.saved is not None and directory.resolve() == self.saved[0].resolve():
            directory, revision = self.saved
            if store.load(directory).revision != revision:
                raise UserError(
                    f"/save: {directory} was changed by another run; name a new directory"
                )
        elif store.exists(directory):
            raise UserError(f"/save: {directory} holds another session; name a new directory")
        else:
            store.check_new(directory)
        try:
            files.make_private(directory)
            tokens = len(self.conversation.tokens)
            config, dtype = self.checkpoint.config, self.answering.dtype
            check_room(directory, config, tokens=tokens, batch=1, dtype=dtype)
        except OSError as error:
            raise UserError(
                f"/save: {directory} cannot be written ({error.strerror}); name another place"
            ) from None
        say_reading(self.checkpoint)
        try:
            fingerprint = self.checkpoint.fingerprint
        except RunError:
            raise UserError(
                f"/save: {self.checkpoint.path} was changed since this chat began, so its KV would "
                "be taken for that of another model; the conversation goes on, unsaved"
            ) from None
        request = Save(
            tokens=(tuple(self.conversation.tokens),),
            directory=str(directory),
            fingerprint=fingerprint,
            chat=(self.conversation.dialogue,),
        )
        try:
            manifest = self.resident.save(request)
        except RankFailed:
            raise
        except RunError as error:
            raise UserError(f"/save: {error}") from None
        self.saved, self._kept = (directory, manifest.revision), self.conversation.dialogue
        draw.say(
            f"saved {len(self.conversation.tokens):,} tokens; "
            f"continue with: cptool chat {shlex.quote(str(directory))}"
        )

    def end(self) -> None:
        """Save what was said since to the session that the conversation goes on from, as `decode`
        does; say so where what was said is lost.

        UserError if it cannot be saved.
        """
        dialogue = self.conversation.dialogue
        if dialogue.messages == self._kept.messages:
            return
        if self.saved is not None and dialogue.continues(self._kept):
            self.save("")
        elif dialogue.answers and sys.stdin.isatty():
            draw.say("this conversation was not saved; /save keeps one")

    def file(self, argument: str) -> None:
        """Put a file into the message that the next question completes."""
        from cptool.cli.options.prompt_files import read_text

        if not argument:
            raise UserError("/file: name a text file: /file PATH")
        limit = self.checkpoint.config.max_position_embeddings
        before, text = len(self.conversation.tokens), read_text(expanded(argument), limit)
        if not text:
            raise UserError(f"/file: {argument} is empty")
        self.conversation.attach(text)
        tokens = len(self.conversation.tokens)
        if tokens >= limit:
            self.conversation.undo()
            raise UserError(
                f"/file: with {argument} the context has {tokens:,} tokens, the model's limit is "
                f"{limit:,}; nothing was changed"
            )
        draw.say(f"{argument}: {tokens - before:,} tokens, read with your next question")

    def retry(self, argument: str) -> None:
        """Answer the last question again; the answer so far stays if that does not come about."""
        before = copy(self.conversation)
        answers = before.dialogue.answers
        if before.dialogue.pending or not answers:
            raise UserError("/retry: the last question has no answer yet; ask something first")
        if not self.answering.sampling.temperature:
            raise UserError(
                "/retry: at temperature 0 the answer would be the same; start the chat with "
                "--temperature 0.8, say"
            )
        question = self.conversation.undo()
        assert question is not None  # it is answered
        try:
            self.ask(question, self._retries + 1)
        finally:
            if self.conversation.dialogue.answers < answers:
                self.conversation = before

    def undo(self, argument: str) -> None:
        question = self.conversation.undo()
        if question is None:
            raise UserError("/undo: there is no question to take back")
        shown = " ".join(question.split())
        draw.say(f"took back: {shown if len(shown) <= 60 else shown[:57] + '...'}")

    def reset(self, argument: str) -> None:
        self.conversation.reset()
        draw.say("a new conversation")

    def help(self, argument: str) -> None:
        draw.say(HELP)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
