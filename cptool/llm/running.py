"""A request that the ranks of an `LLM` work on, and the thread that waits for their replies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Generic, TypeVar

from cptool.engine.answers.records import Emit
from cptool.engine.resident import Resident
from cptool.errors import RunError, UserError

_T = TypeVar("_T")


class Turns:
    """A lock for calls that take turns. A thread that holds it is refused: it reads a stream."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    @contextmanager
    def next(self) -> Iterator[None]:
        """Keep other threads' calls waiting while the body runs."""
        if self._holder == threading.get_ident():
            raise UserError(
                "this thread is reading a stream of this LLM; read it to its end, or close it, "
                "before another call"
            )
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None


class Running(Generic[_T]):
    """A request under way: `request(ranks, emit)`, which a thread of its own calls.

    What a signal raises in the caller's thread, such as KeyboardInterrupt, therefore leaves no half
    of a reply in the ranks' connection, and the ranks can be told to stop.
    """

    def __init__(self, ranks: Resident, request: Callable[[Resident, Emit], _T]) -> None:
        self._ranks, self._request = ranks, request
        self._tokens: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        self._values: list[_T] = []
        self._failure: BaseException | None = None
        self._over = self._stopping = self._sent = False
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="cptool-request", daemon=True)

    def start(self) -> None:
        """Send the request."""
        self._thread.start()

    def tokens(self) -> Iterator[tuple[int, int]]:
        """Yield sequence and token as they come, until the ranks have replied."""
        while not self._over:
            token = self._tokens.get()
            if token is None:
                self._over = True
            else:
                yield token

    def result(self) -> _T:
        """Return what the request returned, or raise what it raised, once the ranks have replied.
        Tokens that nobody has read are dropped.
        """
        for _ in self.tokens():
            pass
        if self._failure is not None:
            raise self._failure
        return self._values[0]

    def stop(self) -> None:
        """Have the ranks stop if they have not replied yet, and block until they have. A request
        that was not sent yet will not be. A call that was itself interrupted is not repeated.
        """
        if self._over or self._stopping:
            return
        with self._sending:
            self._stopping = True
        if not self._sent:
            return
        self._ranks.stop()
        self._thread.join()  # not by its last token, which an interrupted `tokens` may have taken
        self._over = True
        self._ranks.stop(False)

    @property
    def sent(self) -> bool:
        """Whether the ranks have the request, so that there will be a result."""
        return self._sent

    @property
    def leaves_ranks_ready(self) -> bool:
        """Whether the ranks have replied in full, or no request was sent."""
        whole = isinstance(self._failure, (UserError, RunError, type(None)))
        return not self._sent or (self._over and whole)

    def _run(self) -> None:
        # An interrupt can come while `start` waits for this thread to begin, which then begins
        # after `stop`.
        with self._sending:
            if self._stopping:
                return
            self._sent = True
        try:
            self._values.append(
                self._request(self._ranks, lambda b, t, _: self._tokens.put((b, t)))
            )
        except BaseException as failure:
            self._failure = failure
        self._tokens.put(None)
