"""Sequences on disk as the Python front door has them: `cptool.Session`."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cptool.engine.requests import Close, Continue, Open, Save
from cptool.errors import RunError, UserError
from cptool.files import expanded, make_private
from cptool.llm.answers import Generation, Keep, Stream
from cptool.llm.options import Answering, GenerateOptions, takes_options
from cptool.llm.prompts import Prompt, check_listed, encoded, is_messages, messages_of
from cptool.llm.running import Turns
from cptool.session import manifest as manifests
from cptool.session import store
from cptool.session.conversation import find_dialogues
from cptool.session.dialogue import Dialogue
from cptool.session.manifest import Damaged
from cptool.session.next_turn import NextTurn, as_it_is, in_template
from cptool.session.unfinished import check_begun

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from cptool.llm.llm import LLM


class Session:
    """Sequences that are kept on disk and continued on any number of ranks; see `LLM.session`.

    A session that begins with chat messages, or that `cptool prefill --chat` or `cptool chat` has
    begun, is a conversation: what follows are messages in the model's template, which is the truth
    about its tokens. Another session has tokens alone, and what follows is appended to them.

        with llm.session("lighthouse") as session:
            session.chat("Here is the keeper's log: ...", max_tokens=100)
            print(session.chat("Who wrote it?").text)

    Every call commits a turn before it returns, so a process that is killed loses at most the turn
    under way; one that KeyboardInterrupt ends, or a stream that is closed, keeps what was said. KV
    stays on the ranks until the session is closed, at the end of a `with` block or with the LLM.
    Calls from several threads run one after another; a stream that other turns have overtaken
    before its first piece is refused.

    tokens: every token of each sequence so far, prompts and answers; empty in a new session.
    """

    def __init__(self, llm: LLM, directory: str | os.PathLike[str]) -> None:
        self._llm, self.directory = llm, expanded(directory)
        self._slot = str(next(llm._slots))
        self._turns = Turns()
        self._sequences: tuple[manifests.Sequence, ...] = ()
        self._dialogues: tuple[Dialogue, ...] | None = None
        self._fault: Damaged | None = None
        self._open: weakref.ref[Stream] | None = None
        store.check_writable(self.directory)
        if not store.exists(self.directory):
            store.check_new(self.directory)
            return
        manifest = store.load(self.directory)
        check_begun(self.directory, manifest)
        store.check_model(manifest, store.identity(llm.checkpoint))
        if manifest.weights != llm.weights:
            raise UserError(
                f"the KV of {self.directory} is that of weights {manifest.weights}, those of this "
                f'LLM are {llm.weights}; make it with weights="{manifest.weights}"'
            )
        if manifest.kv_dtype != llm.kv_dtype:
            raise UserError(
                f"the KV of {self.directory} is {manifest.kv_dtype}, this LLM stores it in "
                f'{llm.kv_dtype}; make it with dtype="{manifest.dtype}" and '
                f'kv_dtype="{manifest.kv_dtype}"'
            )
        try:
            self._dialogues = find_dialogues(self.directory, manifest)
        except Damaged as fault:
            self._fault = fault
        request = Open(slot=self._slot, directory=str(self.directory), revision=manifest.revision)
        llm._call(lambda ranks: ranks.open(request))
        self._sequences = manifest.sequences

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the session's KV from the ranks; it stays on disk. Closes an open stream first."""
        if self._llm._ended.alive:
            if self._open is not None and (stream := self._open()) is not None:
                stream.close()
            self._llm._call(lambda ranks: ranks.close_slot(Close(slot=self._slot)))

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        return tuple(sequence.tokens for sequence in self._sequences)

    @property
    def texts(self) -> list[str]:
        """Everything said so far, as text. Raises UserError if the model has no tokenizer."""
        return [self._llm.tokenizer.decode(list(said)) for said in self.tokens]

    @property
    def messages(self) -> list[list[dict[str, str]]] | None:
        """The messages of each sequence, as chat templates have them; None if the session is not a
        conversation.
        """
        self._check_conversation()
        return None if self._dialogues is None else [d.dicts() for d in self._dialogues]

    @takes_options
    def generate(
        self,
        prompts: Sequence[Prompt] | None = None,
        *,
        raw: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]:
        """Append a prompt to each sequence, then its continuation, and save the turn.

        prompts: one per sequence. In a conversation, texts and messages are the next ones in its
            template; a text that follows a user's message without an answer, such as a document,
            joins it. Without prompts, messages that have no answer are answered, and answers that
            were cut go on; those that have ended get no tokens. The first call of a new session
            fixes the number of sequences.
        raw: append texts and token ids as they are, also in a conversation, which then ends.

        The options are those of `LLM.generate`; a session keeps one answer to each prompt, so there
        is no `samples`. Raises what that does; RunError also if another
        process has continued the session meanwhile.
        """
        answering = Answering.of(options, self._llm.checkpoint)
        with self._turns.next():
            return self._llm._answers(*self._turn(prompts, raw, answering))

    @takes_options
    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        raw: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """Return the pieces of an answer while it is generated, in a session of one sequence.

        The turn is saved at the end of the stream, and where it is closed before. Prompt, `raw` and
        errors are those of `Session.generate`, options those of `LLM.generate`.
        """
        prompts = None if prompt is None else [prompt]
        answering = Answering.of(options, self._llm.checkpoint)
        with self._turns.next():
            before, turn = self._sequences, self._turn(prompts, raw, answering)
        request = turn[0]
        if len(request.tokens) != 1:
            raise UserError(
                f"{self.directory} has {len(request.tokens)} sequences, a stream is of one; "
                "use generate"
            )
        stream = self._llm._stream(*turn, within=self._going_on_from(before))
        self._open = weakref.ref(stream)
        return stream

    @takes_options
    def chat(
        self, question: str, *, system: str | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Answer a question in a conversation and save the turn; a new session begins one.

        `cptool chat` and `cptool decode` continue it. The options are those of `LLM.generate`.

        system: a system message before the first question.
        """
        if system is not None and self._sequences:
            raise UserError("`system` is for the first question of a new session; leave it out")
        first = [] if system is None else [{"role": "system", "content": system}]
        (result,) = self.generate([[*first, {"role": "user", "content": question}]], **options)
        return result

    def _turn(
        self, prompts: Sequence[Prompt] | None, raw: bool, answering: Answering
    ) -> tuple[Continue, Sequence[Sequence[int]], Keep]:
        """Return the request of the next turn, the tokens whose text its answers go on with, and
        what saves them.
        """
        following = self._next(prompts, raw)
        tokens = [
            [*said[:kept], *new]
            for said, kept, new in zip(
                self.tokens or ((),) * len(following.prompts),
                following.keep,
                following.prompts,
                strict=True,
            )
        ]

        def keep(results: list[Generation]) -> None:
            pairs = zip(tokens, results, strict=True)
            said = tuple((*before, *result.token_ids) for before, result in pairs)
            if said != self.tokens or following.chat is not None:
                self._save(said, following.chat, results)

        request = self._llm._request(tokens, answering, self._slot)
        return request, following.before_answers(self._sequences or _EMPTY * len(tokens)), keep

    @contextmanager
    def _going_on_from(self, before: tuple[manifests.Sequence, ...]) -> Iterator[None]:
        """Keep other turns waiting while the body runs. Raises UserError if there was one since the
        session held `before`: the body would undo it.
        """
        with self._turns.next():
            if self._sequences is not before:
                raise UserError(
                    f"{self.directory} has gone on since this stream was made; make another stream"
                )
            yield

    def _next(self, prompts: Sequence[Prompt] | None, raw: bool) -> NextTurn:
        """Return what the sequences are to hold before they are answered."""
        if raw:
            _check_no_messages(prompts or (), "leave `raw` out")
        elif self._sequences:
            self._check_conversation()
        if not self._sequences:
            return self._first(prompts)
        if self._dialogues is not None and not (raw and prompts):
            said = messages_of(prompts or ())
            return in_template(self._sequences, self._dialogues, self._llm.tokenizer, said)
        remedy = f"{self.directory} is not a conversation, so give a text, or begin a new session"
        _check_no_messages(prompts or (), remedy)
        new = encoded(prompts or (), self._llm.checkpoint, begin=False)
        return as_it_is(self._sequences, new)

    def _first(self, prompts: Sequence[Prompt] | None) -> NextTurn:
        """Return what the sequences of a new session are to hold before they are answered."""
        if not prompts:
            raise UserError(f"{self.directory} is a new session; give it prompts")
        check_listed(prompts)
        chat = None
        if is_messages(prompts[0]):
            chat = tuple(Dialogue().extended(messages) for messages in messages_of(prompts))
            new = [self._llm.tokenizer.chat(dialogue.dicts()) for dialogue in chat]
        else:
            remedy = "all prompts of a session are messages, or none is"
            _check_no_messages(prompts, remedy)
            new = encoded(prompts, self._llm.checkpoint, begin=True)
        return NextTurn(prompts=tuple(map(tuple, new)), keep=(0,) * len(new), chat=chat)

    def _save(
        self,
        tokens: tuple[tuple[int, ...], ...],
        asked: tuple[Dialogue, ...] | None,
        results: list[Generation],
    ) -> None:
        """Commit the session's `tokens`, which end in `results`, the answers to `asked`."""
        dialogues = None
        if asked is not None:
            decode = self._llm.tokenizer.decode
            dialogues = tuple(
                dialogue.answered(
                    said, len(result.token_ids), decode, ended=result.stopped == "eos"
                )
                for dialogue, said, result in zip(asked, tokens, results, strict=True)
            )
        try:
            make_private(self.directory)
        except OSError as error:
            raise RunError(f"{self.directory} cannot be written ({error.strerror})") from None
        request = Save(
            tokens=tokens,
            directory=str(self.directory),
            fingerprint=self._llm.checkpoint.fingerprint,
            chat=dialogues,
            slot=self._slot,
        )
        manifest = self._llm._call(lambda ranks: ranks.save(request))
        self._sequences, self._dialogues = manifest.sequences, dialogues

    def _check_conversation(self) -> None:
        """Raise Damaged if the session is a conversation whose messages are damaged."""
        if self._fault is not None:
            raise self._fault


_EMPTY = (manifests.Sequence(tokens=(), cached=0),)


def _check_no_messages(prompts: Sequence[Prompt], remedy: str) -> None:
    """Raise UserError for prompts that go into the chat template."""
    check_listed(prompts)
    for number, prompt in enumerate(prompts, 1):
        if is_messages(prompt):
            raise UserError(f"prompt {number}: chat messages go into the chat template; {remedy}")
