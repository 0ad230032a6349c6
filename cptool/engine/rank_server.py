"""A model that stays on its ranks between requests of the process that started them.

`Resident` is that process's side, `serve` what every rank runs. Each rank has a connection of its
own to wait on, not a collective: idle ranks burn no CPU and meet no timeout, however long the user
thinks. All ranks get the same requests and so make the same calls; the first one answers. The
connections are pairs of sockets without a name, of which the ranks inherit one end: nobody else can
connect, and what they carry is typed data (`cptool.distributed.encoding`).
"""

import multiprocessing
import select
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptool.distributed import launch
from cptool.distributed.encoding import decode, encode
from cptool.distributed.failure import RankFailed
from cptool.distributed.options import RankOptions
from cptool.engine.sampling import Sampling
from cptool.engine.turn import Setup, open_engine
from cptool.errors import RunError, explain

if TYPE_CHECKING:
    from cptool.distributed.world import World
    from cptool.session.store import Manifest

_STOP, _END = "stop", "end"
_PATIENCE_S = 5.0
_LENGTH = struct.Struct("<Q")
_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Continue:
    """Make the sequence say `tokens`, with what KV is of use, and append up to `limit` more, of
    which one of `stop_ids` is the last.
    """

    tokens: tuple[int, ...]
    limit: int
    sampling: Sampling
    stop_ids: tuple[int, ...]


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


@dataclass(frozen=True)
class NotSaved:
    """Why the session was not committed; the ranks go on."""

    reason: str


class Connection:
    """One end of a pair of sockets that carries values, a length before each."""

    def __init__(self, end: socket.socket):
        self._socket = end

    def limit_sending(self, seconds: float) -> None:
        """Have `send` raise BlockingIOError where the other end takes nothing for so long."""
        whole, part = divmod(seconds, 1)
        limit = struct.pack("@ll", int(whole), int(part * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, value: Any) -> None:
        """OSError where the other end is gone."""
        data = encode(value, _messages())
        self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> Any:
        """Blocks until a value has come. EOFError where the other end is gone."""
        (size,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if size > _MOST_BYTES:
            raise ValueError(f"a message of {size} bytes; at most {_MOST_BYTES} can be")
        return decode(self._read(size), _messages())

    def poll(self) -> bool:
        """Whether something has come, or the other end is gone."""
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        return bool(waiting.poll(0))

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        left = memoryview(data)
        while left:
            count = self._socket.recv_into(left)
            if not count:
                raise EOFError
            left = left[count:]
        return data


def _messages() -> tuple[type, ...]:
    from cptool.session.manifest import Manifest, ModelIdentity, Segment, Sequence

    return Continue, Save, Sampling, Answer, NotSaved, Manifest, ModelIdentity, Segment, Sequence


class Resident:
    """Ranks at work for this process; a context manager that ends them.

    `cptool.distributed.launch.run` runs in a thread. If ranks end before they are told to, the
    call that waits for them raises whatever `run` raised.
    """

    def __init__(self, setup: Setup, ranks: RankOptions) -> None:
        pairs = [socket.socketpair() for _ in range(ranks.count)]
        self._connections = [Connection(ours) for ours, _ in pairs]
        self._theirs = [theirs for _, theirs in pairs]
        self._failure: BaseException | None = None
        self._sending = self._stop_is_due = False
        self._timeout = ranks.timeout
        for connection in self._connections:
            connection.limit_sending(self._timeout)
        self._setup, self._ranks = setup, ranks
        self._thread = threading.Thread(target=self._run, name="cptool-ranks", daemon=True)
        self._others = set(multiprocessing.active_children())  # not ours to end

    def __enter__(self) -> "Resident":
        try:
            if len(self._connections) > 1:
                from cptool.distributed import server_process

                server_process.start(serve)  # here, for its signals are the main thread's
            self._thread.start()
            self._receive()  # that all are ready
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
        for connection in self._connections:
            connection.close()
        for theirs in self._theirs:
            theirs.close()
        # A single rank is that thread: left at work, it would be torn down with the interpreter.
        if self._thread.is_alive():
            self._thread.join(_PATIENCE_S)

    def answer(self, request: Continue, emit: Callable[[int], None]) -> Answer:
        """Fulfils the request; `emit(token)` is called for each token as it comes."""
        self._send(request)
        while not isinstance(reply := self._receive(), Answer):
            emit(reply)
        return reply

    def stop(self) -> None:
        """Ends the answer that is coming with its next token; a signal handler may call it."""
        if self._sending:  # in the midst of a request, which must not be cut in two
            self._stop_is_due = True
        else:
            self._connections[0].send(_STOP)

    def save(self, request: Save) -> "Manifest":
        """Commits and returns the session's manifest. RunError where that cannot be; the ranks go
        on.
        """
        self._send(request)
        reply = self._receive()
        if isinstance(reply, NotSaved):
            raise RunError(reply.reason)
        return reply

    def _send(self, request: Any) -> None:
        self._sending, taken = True, 0
        try:
            for connection in self._connections:
                connection.send(request)
                taken += 1
        except BlockingIOError:
            for process in set(multiprocessing.active_children()) - self._others:
                process.kill()  # whoever is stopped hears nothing else
            told = f"no answer from rank {taken}, which took no request for {self._timeout:g} s"
            raise RankFailed(f"{told}; all ranks were ended") from None
        except OSError:
            self._raise()
        finally:
            self._sending = False
        if self._stop_is_due:
            self._stop_is_due = False
            self.stop()

    def _receive(self) -> Any:
        try:
            return self._connections[0].receive()
        except (EOFError, OSError):
            self._raise()

    def _raise(self) -> None:
        self._thread.join()
        raise self._failure or RuntimeError("the ranks have ended by themselves")

    def _run(self) -> None:
        try:
            launch.run(serve, self._setup, ranks=self._ranks, own=self._theirs)
        except BaseException as failure:
            self._failure = failure
        finally:
            for theirs in self._theirs:  # Ranks have copies. Whoever waits for an answer wakes up.
                theirs.close()


def serve(world: "World", setup: Setup, end: socket.socket) -> None:
    """Serves requests until the other side says so or is gone. end: this rank's of a pair."""
    if world.size > 1:
        import signal

        # Ctrl-C reaches every process of the terminal; what it means is for the other side to say.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Connection(end) as connection:
        try:
            _serve(world, setup, connection)
        except (EOFError, ConnectionError):
            return


def _serve(world: "World", setup: Setup, connection: Connection) -> None:
    from cptool.engine import saving
    from cptool.session import store

    checkpoint, engine = open_engine(world, setup)
    where, manifest = setup.session, None
    if where is not None:
        manifest = store.load(Path(where), setup.resume)
        saving.restore(engine, Path(where), manifest)
    world.barrier()

    def reply(value: Any) -> None:
        if world.rank == 0:
            connection.send(value)

    def stopped() -> bool:
        return connection.poll() and connection.receive() == _STOP

    reply("ready")
    while True:
        world.report("wait for a request")
        request = connection.receive()
        if request == _END:
            return
        if request == _STOP:  # came after the last token of its answer
            continue
        tokens = list(request.tokens)
        shared = store.common_prefix(engine.tokens[0], tokens)
        engine.truncate([shared])
        if manifest is not None:
            # What is on disk beyond the common beginning no longer counts, once this is saved.
            manifest = manifest.truncated([min(shared, len(manifest.sequences[0].tokens))])
        if isinstance(request, Continue):
            reused = engine.computed[0]
            engine.extend([tokens[shared:]], reserve=request.limit)
            ids = engine.decode(
                request.limit,
                request.sampling,
                request.stop_ids,
                emit=lambda sequence, token: reply(token),
                interrupted=stopped,
            )[0]
            reply(Answer(ids, reused))
            continue
        engine.append([tokens[shared:]])
        base = manifest if request.directory == where else None
        model = store.identity(checkpoint, request.fingerprint)
        try:
            manifest = saving.save(engine, Path(request.directory), base, model, chat=request.chat)
        except (RunError, OSError) as error:
            reply(NotSaved(explain(error)))
            continue
        where = request.directory
        reply(replace(manifest, segments=()))
