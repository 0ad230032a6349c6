"""A model that stays on its ranks between requests of the process that started them.

`Resident` is that process's side, `serve` what every rank runs. Each rank has a connection of its
own to wait on, not a collective: idle ranks burn no CPU and meet no timeout, however long the user
thinks. All ranks get the same requests and so make the same calls; the first one answers.
"""

import multiprocessing
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptool import distributed
from cptool.sampling import Sampling
from cptool.scratch import make_folder
from cptool.turn import Setup, open_engine

if TYPE_CHECKING:
    from cptool.distributed import World
    from cptool.session import Manifest

_STOP, _END = "stop", "end"
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Continue:
    """Make the sequence say `tokens`, with what KV is of use, and append up to `limit` more."""

    tokens: tuple[int, ...]
    limit: int
    sampling: Sampling


@dataclass(frozen=True)
class Save:
    """Make the sequence say `tokens`, computing nothing, and commit it to a session, with this
    state of the conversation; `fingerprint` is the model's.
    """

    tokens: tuple[int, ...]
    directory: str
    chat: dict
    fingerprint: str


@dataclass(frozen=True)
class Answer:
    """`reused` of the tokens asked for had KV."""

    token_ids: list[int]
    reused: int


class Resident:
    """Ranks at work for this process; a context manager that ends them.

    `ranks` are keyword arguments of `distributed.run`, which runs in a thread. When ranks end
    before they are told to, whatever `run` raised comes out of the call that was waiting for them.
    """

    def __init__(self, setup: Setup, **ranks: Any):
        self._folder = make_folder()
        self._address, self._key = os.path.join(self._folder.name, "ranks"), secrets.token_bytes(32)
        self._failure: BaseException | None = None
        self._setup, self._ranks = setup, ranks
        self._connections: dict[int, Connection] = {}
        self._thread = threading.Thread(target=self._run, name="cptool-ranks", daemon=True)
        self._others = set(multiprocessing.active_children())  # not ours to end

    def __enter__(self) -> "Resident":
        if self._ranks["cp"] * self._ranks["tp"] > 1:
            from cptool.local_launch import start_server

            start_server(serve)
        try:
            with Listener(self._address, authkey=self._key) as listener:
                self._thread.start()
                while len(self._connections) < self._ranks["cp"] * self._ranks["tp"]:
                    connection = listener.accept()
                    rank = connection.recv()
                    if rank is None:
                        self._raise()
                    self._connections[rank] = connection
            self._receive()
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self._abandon()
            return
        self._send(_END)
        self._thread.join()
        self._close()

    def _abandon(self) -> None:
        """Ends ranks that may be in the midst of a computation, where they read no request."""
        for rank in set(multiprocessing.active_children()) - self._others:
            rank.terminate()
        self._close()

    def _close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        # A single rank is that thread: left at work, it would be torn down with the interpreter.
        if self._thread.is_alive():
            self._thread.join(_PATIENCE_S)
        self._folder.cleanup()

    def answer(self, request: Continue, emit: Callable[[int], None]) -> Answer:
        """Fulfils the request; `emit(token)` is called for each token as it comes."""
        self._send(request)
        while not isinstance(reply := self._receive(), Answer):
            emit(reply)
        return reply

    def stop(self) -> None:
        """Ends the answer that is coming with its next token; a signal handler may call it."""
        self._connections[0].send(_STOP)

    def save(self, request: Save) -> "Manifest":
        """Commits and returns the session's manifest."""
        self._send(request)
        return self._receive()

    def _send(self, request: Any) -> None:
        try:
            for connection in self._connections.values():
                connection.send(request)
        except OSError:
            self._raise()

    def _receive(self) -> Any:
        try:
            return self._connections[0].recv()
        except (EOFError, OSError):
            self._raise()

    def _raise(self) -> None:
        self._thread.join()
        raise self._failure or RuntimeError("the ranks have ended by themselves")

    def _run(self) -> None:
        try:
            distributed.run(serve, self._setup, self._address, self._key, **self._ranks)
        except BaseException as failure:
            self._failure = failure
        try:  # Where the ranks failed before all of them called, somebody still waits for a call.
            with Client(self._address, authkey=self._key) as connection:
                connection.send(None)
        except (OSError, EOFError, AuthenticationError):
            pass


def serve(world: "World", setup: Setup, address: str, key: bytes) -> None:
    """Serves requests until the other side says so or is gone."""
    if world.size > 1:
        import signal

        # Ctrl-C reaches every process of the terminal; what it means is for the other side to say.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Client(address, authkey=key) as connection:
        connection.send(world.rank)
        try:
            _serve(world, setup, connection)
        except (EOFError, ConnectionError):
            return


def _serve(world: "World", setup: Setup, connection: Connection) -> None:
    from cptool import session

    checkpoint, engine = open_engine(world, setup)
    where, manifest = setup.session, None
    if where is not None:
        manifest = session.load(Path(where), setup.resume)
        engine.restore(Path(where), manifest)
    world.barrier()

    def reply(value: Any) -> None:
        if world.rank == 0:
            connection.send(value)

    def stopped() -> bool:
        return connection.poll() and connection.recv() == _STOP

    reply("ready")
    while True:
        world.report("wait for a request")
        request = connection.recv()
        if request == _END:
            return
        if request == _STOP:  # came after the last token of its answer
            continue
        tokens = list(request.tokens)
        shared = session.common_prefix(engine.tokens[0], tokens)
        engine.truncate([shared])
        if manifest is not None:
            # What is on disk beyond the common beginning no longer counts, once this is saved.
            manifest = manifest.truncated([min(shared, len(manifest.sequences[0].tokens))])
        if isinstance(request, Continue):
            reused = engine.computed[0]
            engine.extend([tokens[shared:]], reserve=request.limit)
            ids = engine.decode(
                request.limit, request.sampling, checkpoint.eos_ids,
                emit=lambda sequence, token: reply(token), interrupted=stopped,
            )[0]  # fmt: skip
            reply(Answer(ids, reused))
            continue
        engine.tokens[0].extend(tokens[shared:])  # their KV is pending, as a last token's is
        if request.directory != where:
            where, manifest = request.directory, None
            engine.saved = [0]
        model = session.identity(checkpoint, request.fingerprint)
        manifest = engine.save(Path(where), manifest, model, request.chat)
        reply(replace(manifest, segments=()))
