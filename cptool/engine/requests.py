"""The messages between the starting process and its ranks, and how they travel.

Each rank has a connection of its own: a pair of sockets without a name, of which the rank inherits
one end, so that no other process can connect. It carries typed data, never pickles
(`cptool.distributed.encoding`).
"""

import socket
import struct
from dataclasses import dataclass, field
from typing import Any

from cptool.distributed.encoding import decode, encode
from cptool.engine.answers.records import AnswerOptions, Drafted, Logprobs, TokenLogprob
from cptool.engine.sampling import Sampling
from cptool.session.dialogue import Dialogue

END = "end"
"""The request without contents: end the ranks."""

_LENGTH = struct.Struct("<Q")
_MOST_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Open:
    """Fill `slot` with the session in `directory` at `revision`, as a batch of sequences."""

    slot: str
    directory: str
    revision: int


@dataclass(frozen=True, kw_only=True)
class Close:
    """Drop what `slot` holds, and its KV."""

    slot: str


@dataclass(frozen=True, kw_only=True)
class Continue:
    """Make the sequences of `slot` hold `tokens` and append an answer to each.

    KV of the tokens that a sequence has in common with what it held is used again, unless `fresh`:
    then the result does not depend on earlier requests.

    samples: answers to each sequence, one after another, which share its KV. If there are several,
        the slot holds `tokens` alone afterwards.
    prompt_logprobs: report as many of each token that is new to `slot` as `options.logprobs` does
        of an answer's.
    scored_from: with it, the index in `tokens[b]` of the first one that is reported; by default all
        are. The others have no log-probability in the answer.
    """

    tokens: tuple[tuple[int, ...], ...]
    options: AnswerOptions
    samples: int = 1
    prompt_logprobs: int | None = None
    scored_from: tuple[int, ...] | None = None
    slot: str = ""
    fresh: bool = False


@dataclass(frozen=True, kw_only=True)
class Save:
    """Make the sequences of `slot` hold `tokens`, computing nothing, and commit them to a session.

    chat: the messages of each sequence, if they are conversations. fingerprint: the model's.
    """

    tokens: tuple[tuple[int, ...], ...]
    directory: str
    fingerprint: str
    chat: tuple[Dialogue, ...] | None = None
    slot: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The tokens of each answer, and what `Answers` says of them.

    If the request was stopped while it read the prompt, there are none, all are "interrupted", and
    the slot holds what it had in common with the request and the chunks that were computed.
    `reused[b]` of the tokens requested had KV already. `prompt_logprobs` are those of the last
    tokens requested.
    """

    token_ids: tuple[tuple[int, ...], ...]
    stopped: tuple[str, ...]
    reused: tuple[int, ...]
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    drafts: Drafted = field(default_factory=Drafted)


@dataclass(frozen=True, kw_only=True)
class Done:
    """The request was fulfilled and has no other result."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Why a request was not fulfilled; the ranks go on. mistake: whether it was the caller's."""

    reason: str
    mistake: bool


class Connection:
    """One end of a pair of sockets that carries values, a length before each."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def limit_sending(self, seconds: float) -> None:
        """Have `send` raise BlockingIOError if the other end accepts nothing for so long."""
        whole, part = divmod(seconds, 1)
        limit = struct.pack("@ll", int(whole), int(part * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close this end; the other one sees that it is gone."""
        self._socket.close()

    def send(self, value: Any) -> None:
        """Send a value. Raises OSError if the other end is gone."""
        data = encode(value, _messages())
        self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> Any:
        """Block until a value arrives and return it. Raises EOFError if the other end is gone."""
        (size,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if size > _MOST_BYTES:
            raise ValueError(f"a message of {size} bytes; at most {_MOST_BYTES} are read")
        return decode(self._read(size), _messages())

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

    requests = (Open, Close, Continue, Save, AnswerOptions, Sampling, Dialogue)
    replies = (
        Answer,
        Drafted,
        TokenLogprob,
        Done,
        Refused,
        Manifest,
        ModelIdentity,
        Segment,
        Sequence,
    )
    return requests + replies
