"""What every rank runs whose model stays loaded between requests (`cptool.engine.resident`).

All ranks get the same requests and so make the same calls; rank 0 replies.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptool.distributed.status_board import IDLE
from cptool.engine.requests import (
    END,
    Answer,
    Close,
    Connection,
    Continue,
    Done,
    Open,
    Refused,
    Save,
)
from cptool.engine.setup.loading import Setup, load_for, make_engine
from cptool.errors import Interrupted, RunError, UserError, explain

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.distributed.world import World
    from cptool.engine.drafts.small import SmallModel
    from cptool.engine.engine import Engine
    from cptool.model.llama import Llama
    from cptool.session.store import Manifest


def serve(world: "World", setup: Setup, end: socket.socket) -> None:
    """Serve requests until the other side ends the ranks or is gone; `end` is this rank's socket.

    Collective.
    """
    if world.size > 1:
        import signal

        # Ctrl-C reaches every process of the terminal; only the other side acts on it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Connection(end) as connection:
        try:
            _Server(world, setup, connection).serve()
        except (EOFError, ConnectionError):
            return


@dataclass
class _Slot:
    """A batch of sequences, and the session that it continues, if it is one."""

    engine: "Engine"
    directory: str | None = None
    manifest: "Manifest | None" = None


class _Server:
    """One rank's side: the model, and an engine per slot."""

    def __init__(self, world: "World", setup: Setup, connection: Connection) -> None:
        self.world, self.setup, self.connection = world, setup, connection
        self.checkpoint: Checkpoint
        self.model: Llama
        self.checkpoint, self.model = load_for(world, setup)
        self.slots: dict[str, _Slot] = {}
        self.small: tuple[str, SmallModel | None] = "off", None
        if setup.session is not None:
            self.slots[""] = self.loaded(setup.session, setup.resume)

    def serve(self) -> None:
        """Fulfil one request after another until END."""
        fulfil: dict[type, Callable[[Any], Any]] = {
            Open: self.open,
            Close: self.close,
            Continue: self.go_on,
            Save: self.save,
        }
        self.world.barrier()
        self.reply("ready")
        while True:
            self.world.report(IDLE)
            request = self.connection.receive()
            if request == END:
                return
            self.reply(fulfil[type(request)](request))

    def reply(self, value: Any) -> None:
        if self.world.rank == 0:
            self.connection.send(value)

    def loaded(self, directory: str, revision: int | None) -> _Slot:
        from cptool.engine import saving
        from cptool.session import store, unfinished

        manifest = unfinished.with_what_follows(store.load(Path(directory), revision))
        engine = make_engine(self.world, self.setup, self.model, batch=len(manifest.sequences))
        saving.restore(engine, Path(directory), manifest)
        return _Slot(engine, directory, manifest)

    def open(self, request: Open) -> Done | Refused:
        from cptool.engine.saving import raise_everywhere
        from cptool.session import store

        try:
            fault = None
            try:  # what one rank alone may find, before all read together
                store.load(Path(request.directory), request.revision)
            except (UserError, RunError, OSError) as error:
                fault = error
            raise_everywhere(self.world, fault)
            self.slots[request.slot] = self.loaded(request.directory, request.revision)
        except (UserError, RunError, OSError) as error:
            return Refused(reason=explain(error), mistake=isinstance(error, UserError))
        return Done()

    def close(self, request: Close) -> Done:
        self.slots.pop(request.slot, None)
        return Done()

    def go_on(self, request: Continue) -> Answer | Refused:
        from cptool.engine.answers.decode import decode
        from cptool.engine.prefill.prompt import read
        from cptool.engine.samples import sampled

        slot = self.slot_of(request)
        engine = slot.engine
        shared = self.go_back(slot, request.tokens, fresh=request.fresh)
        reused = tuple(engine.computed)
        new = [list(said[n:]) for said, n in zip(request.tokens, shared, strict=True)]
        room = max(request.options.limits(len(new)))
        try:
            self.check_memory(engine, list(map(len, new)), room=room, request=request)
            self.load_small(request.options.draft)
        except UserError as error:
            return Refused(reason=explain(error), mistake=True)
        first = request.scored_from or [0] * len(new)
        try:
            answer = room if request.samples == 1 else 0
            scores = read(
                engine,
                new,
                request.prompt_logprobs,
                answer=answer,
                scored_from=[max(0, at - n) for at, n in zip(first, shared, strict=True)],
            ).scores
        except Interrupted:
            count = len(new) * request.samples
            return Answer(token_ids=((),) * count, stopped=("interrupted",) * count, reused=reused)
        answers = decode(
            sampled(engine, request.samples, room=room),
            request.options,
            tokenizer=self.checkpoint.tokenizer() if request.options.stop_texts else None,
            emit=lambda *token: self.reply(list(token)),
            interrupted=lambda: self.world.board.cancelled,
            small=self.small[1],
        )
        return Answer(**answers.fields(), reused=reused, prompt_logprobs=scores)

    def load_small(self, draft: str) -> None:
        """Load the model that drafts, which stays until another source drafts. Collective."""
        from cptool.engine.setup import drafting

        if draft != self.small[0]:
            self.small = "off", None  # free its memory first
            self.small = draft, drafting.load(self.world, self.setup, draft)

    def check_memory(
        self, engine: "Engine", new: list[int], *, room: int, request: Continue
    ) -> None:
        """Raise UserError on all ranks if one would take more memory than it may for prompts with
        `new[b]` more tokens and the model that drafts. Collective.
        """
        from cptool.engine.drafts.names import model_of
        from cptool.engine.setup import drafting
        from cptool.engine.setup.memory import check
        from cptool.planning.chunks import UNIT

        draft = request.options.draft
        if sum(new) < UNIT and model_of(draft) is None:
            return
        work = self.setup.on(self.world, self.checkpoint, new=new, cached=engine.computed)
        work = replace(work, answer=room, samples=request.samples)
        kept = sum(slot.engine.cache.nbytes for slot in self.slots.values())
        check(
            self.world,
            work,
            engine.profile,
            options=self.setup.options,
            beside=kept - engine.cache.nbytes,
            drafts=drafting.bytes_of(self.setup, draft, work, engine.profile),
        )

    def save(self, request: Save) -> "Manifest | Refused":
        from cptool.engine import saving
        from cptool.session import store

        slot = self.slot_of(request)
        shared = self.go_back(slot, request.tokens)
        new = [list(said[n:]) for said, n in zip(request.tokens, shared, strict=True)]
        slot.engine.append(new)
        base = slot.manifest if request.directory == slot.directory else None
        try:
            slot.manifest = saving.save(
                slot.engine,
                Path(request.directory),
                base,
                store.identity(self.checkpoint, request.fingerprint),
                chat=request.chat,
            )
        except (RunError, OSError) as error:
            return Refused(reason=explain(error), mistake=False)
        slot.directory = request.directory
        return replace(slot.manifest, segments=())

    def slot_of(self, request: Continue | Save) -> _Slot:
        """Return the request's slot, with room for its number of sequences."""
        slot, batch = self.slots.get(request.slot), len(request.tokens)
        if slot is None or len(slot.engine.tokens) != batch:
            self.slots.pop(request.slot, None)  # free its KV first
            slot = _Slot(make_engine(self.world, self.setup, self.model, batch=batch))
            self.slots[request.slot] = slot
        return slot

    def go_back(
        self, slot: _Slot, tokens: tuple[tuple[int, ...], ...], *, fresh: bool = False
    ) -> list[int]:
        """Go back to what the slot's sequences have in common with `tokens`, and return how many
        tokens that is for each.
        """
        from cptool.session import store

        pairs = zip(slot.engine.tokens, tokens, strict=True)
        shared = [0 if fresh else store.common_prefix(held, said) for held, said in pairs]
        slot.engine.truncate(shared)
        if slot.manifest is not None:
            # What is on disk beyond the common beginning no longer counts, once this is saved.
            saved = [len(sequence.tokens) for sequence in slot.manifest.sequences]
            slot.manifest = slot.manifest.truncated(list(map(min, shared, saved)))
        return shared
