"""The session that a turn continues, from before its first token to after its last."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptool.distributed.status_board import SAVING
from cptool.engine import saving
from cptool.engine.prefill import chunks
from cptool.engine.prefill.auto import chunk_for
from cptool.engine.prefill.keeping import Keeper, Place
from cptool.session import store, unfinished
from cptool.session.dialogue import Dialogue
from cptool.session.manifest import Manifest
from cptool.session.manifest import Sequence as Saved

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.engine.engine import Engine
    from cptool.engine.turn import Turn


class TurnSession:
    """What becomes of a turn's session, if it has one; all ranks call its methods together.

    rest: the tokens of each prompt that are to be read. cached: tokens of each sequence that have
        KV from before. resumed: how many of them are this turn's, because an earlier run of it was
        interrupted. chunk: the most of them that are read at a time.
    """

    def __init__(self, engine: Engine, turn: Turn, checkpoint: Checkpoint) -> None:
        """Restore the session into `engine`, if the turn continues one.

        Raises RunError if it was changed since the turn was planned, UserError if it is damaged or
        another model's.
        """
        self.engine, self.turn, self.checkpoint = engine, turn, checkpoint
        self.rest = [list(prompt) for prompt in turn.prompts]
        self.resumed, self.cached = 0, [0] * len(turn.prompts)
        self._manifest: Manifest | None = None
        self._keeper: Keeper | None = None
        if turn.resume is None:
            self.chunk = self._chunk([len(prompt) for prompt in turn.prompts], self.cached)
        if turn.session is None:
            return
        directory, batch = Path(turn.session), len(turn.prompts)
        identity = store.identity(checkpoint, turn.fingerprint)
        before, keep = (Saved(tokens=(), cached=0),) * batch, (0,) * batch
        if turn.resume is not None:
            self._manifest = manifest = store.load(directory, turn.resume)
            store.check_model(manifest, identity)
            before = manifest.sequences
            keep = turn.keep or tuple(len(sequence.tokens) for sequence in before)
            self._restore(directory, manifest)
        place = Place(
            directory=directory,
            identity=identity,
            every=turn.save_every,
            before=before,
            keep=keep,
        )
        self._keeper = Keeper(engine, place, self._manifest)

    def _restore(self, directory: Path, manifest: Manifest) -> None:
        turn, engine = self.turn, self.engine
        self.resumed = unfinished.taken(manifest, turn.keep, turn.prompts)
        state, self.rest = unfinished.going_on(manifest, turn.keep, turn.prompts)
        pairs = zip(state.sequences, self.rest, strict=True)
        left = [len(s.tokens) - s.cached + len(prompt) for s, prompt in pairs]
        self.chunk = self._chunk(left, [s.cached for s in state.sequences])
        room = chunks.room(left, self.chunk, ranks=engine.world.cp, answer=turn.max_new_tokens)
        saving.restore(engine, directory, state, reserve=room)
        self.cached = list(engine.computed)

    def _chunk(self, left: list[int], cached: list[int]) -> int:
        turn = self.turn
        every = None if turn.session is None else turn.save_every
        return chunk_for(self.engine, left, cached, answer=turn.max_new_tokens, every=every)

    def fields(self) -> dict[str, Any]:
        """Return the fields of a `Report`."""
        return {"cached": sum(self.cached), "resumed": self.resumed}

    def between_chunks(self) -> None:
        """Keep what is computed of the prompt, from time to time. Collective."""
        if self._keeper is not None:
            self._keeper.between_chunks()

    def keep_unfinished(self) -> int:
        """Keep what is computed of the prompt, whose reading was interrupted, and return how many
        tokens of it the session has. Collective.
        """
        if self._keeper is None:
            return 0
        self.engine.report(SAVING, 0, 0)
        return self._keeper.keep_all()

    def save(self, answers: list[list[int]]) -> None:
        """Commit the turn to the session, if there is one, with the messages of a conversation.
        Collective.
        """
        if self._keeper is None:
            return
        self._keeper.settle()
        place, previous = self._keeper.place, self._keeper.manifest
        if previous is not None:
            # Turns beyond the tokens to which this one has gone back are not there any more.
            previous = replace(previous, turns=previous.truncated(list(place.keep)).turns)
        chat = self._messages_after(answers)
        saving.save(self.engine, place.directory, previous, place.identity, chat=chat)

    def _messages_after(self, answers: list[list[int]]) -> tuple[Dialogue, ...] | None:
        """Return the messages of each sequence once answered, on the rank that commits them."""
        engine, turn = self.engine, self.turn
        if turn.chat is None or engine.world.rank:
            return None
        tokenizer = self.checkpoint.tokenizer()
        assert tokenizer is not None  # it has rendered the messages
        return tuple(
            dialogue.answered(said, len(answer), tokenizer.decode, ended=ended)
            for dialogue, said, answer, ended in zip(
                turn.chat, engine.tokens, answers, engine.ended, strict=True
            )
        )
