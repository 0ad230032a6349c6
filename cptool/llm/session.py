"""Sequences on disk as the Python front door has them: `cptool.Session`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cptool.engine.requests import Close, Open, Save
from cptool.errors import RunError, UserError
from cptool.files import expanded, make_private
from cptool.llm.options import Answering, GenerateOptions, takes_options
from cptool.session import store
from cptool.session.conversation import Conversation
from cptool.session.manifest import Manifest

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from cptool.llm.llm import LLM, Generation, Prompt


class Session:
    """Sequences that are kept on disk and continued on any number of ranks; see `LLM.session`.

    Every call commits a turn before it returns, so a process that is killed loses at most the turn
    under way. KV stays on the ranks until the session is closed, at the end of a `with` block or
    with the LLM.

    tokens: every token of each sequence so far, prompts and answers; empty in a new session.
    """

    def __init__(self, llm: LLM, directory: str | os.PathLike[str]) -> None:
        self._llm, self.directory = llm, expanded(directory)
        self._slot = str(next(llm._slots))
        self._conversation: Conversation | None = None
        self.tokens: tuple[tuple[int, ...], ...] = ()
        store.check_writable(self.directory)
        if not store.exists(self.directory):
            store.check_new(self.directory)
            return
        manifest = store.load(self.directory)
        store.check_model(manifest, store.identity(llm.checkpoint))
        if manifest.dtype != llm.dtype:
            raise UserError(
                f"the KV of {self.directory} is {manifest.dtype}, this LLM computes in "
                f'{llm.dtype}; make it with dtype="{manifest.dtype}"'
            )
        if manifest.chat:
            with contextlib.suppress(UserError):  # continued since by other means than chat
                self._conversation = Conversation.read(self.directory, manifest, llm.tokenizer)
        request = Open(slot=self._slot, directory=str(self.directory), revision=manifest.revision)
        llm._call(lambda ranks: ranks.open(request))
        self._take(manifest)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the session's KV from the ranks; it stays on disk."""
        if self._llm._ended.alive:
            self._llm._call(lambda ranks: ranks.close_slot(Close(slot=self._slot)))

    @property
    def texts(self) -> list[str]:
        """Everything said so far, as text. Raises UserError if the model has no tokenizer."""
        return [self._llm.tokenizer.decode(list(said)) for said in self.tokens]

    @takes_options
    def generate(
        self,
        prompts: Sequence[Prompt] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]:
        """Append a prompt to each sequence, then its continuation, and save the turn.

        prompts: one per sequence; None goes on where the answers ended, except those that ended
            with a stop token. The first call of a new session fixes the number of sequences.

        Raises what `LLM.generate` does; RunError also if another process has continued the session
        meanwhile.
        """
        answering = Answering.of(options, self._llm.checkpoint)
        if not self.tokens and not prompts:
            raise UserError(f"{self.directory} is a new session; give it prompts")
        new: list[list[int]] = [[] for _ in self.tokens]
        if prompts is not None:
            new = self._llm._encoded(prompts, begin=not self.tokens)
        held = self.tokens or [()] * len(new)
        if len(new) != len(held):
            raise UserError(
                f"{len(new)} prompts for a session of {len(held)} sequences; give one for each"
            )
        tokens = [[*said, *added] for said, added in zip(held, new, strict=True)]
        results = self._continued(tokens, answering)
        self._save(tokens, results)
        return results

    @takes_options
    def chat(
        self,
        question: str,
        *,
        system: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Answer a question in the model's chat template and save the conversation.

        `cptool chat` continues it, and this continues what `cptool chat` saved. system: a system
        message for the first question.
        """
        answering = Answering.of(options, self._llm.checkpoint)
        if self._conversation is None and self.tokens:
            raise UserError(f"{self.directory} holds no conversation; continue it with generate")
        if system is not None and self.tokens:
            raise UserError("`system` is for the first question of a new session; leave it out")
        conversation = self._conversation or Conversation(self._llm.tokenizer, system)
        context = conversation.ask(question)
        (result,) = self._continued([context], answering)
        ended = result.stopped == "eos"
        conversation.answered(question, context, list(result.token_ids), ended=ended)
        self._conversation = conversation
        self._save([context], [result], conversation)
        return result

    def _continued(self, tokens: list[list[int]], answering: Answering) -> list[Generation]:
        return self._llm._continued(tokens, answering, slot=self._slot)

    def _save(
        self,
        tokens: list[list[int]],
        results: list[Generation],
        conversation: Conversation | None = None,
    ) -> None:
        try:
            make_private(self.directory)
        except OSError as error:
            raise RunError(f"{self.directory} cannot be written ({error.strerror})") from None
        request = Save(
            tokens=tuple(
                (*said, *result.token_ids) for said, result in zip(tokens, results, strict=True)
            ),
            directory=str(self.directory),
            fingerprint=self._llm.checkpoint.fingerprint,
            chat=(conversation.dialogue,) if conversation else None,
            slot=self._slot,
        )
        self._take(self._llm._call(lambda ranks: ranks.save(request)))

    def _take(self, manifest: Manifest) -> None:
        self.tokens = tuple(sequence.tokens for sequence in manifest.sequences)
