"""The conversation of a session on disk: `chat.json`, beside the manifest that seals it.

The file holds states of the conversation, each with a checksum of its own, which the manifest
repeats for those that belong to the session. The state that belongs to the committed manifest stays
while a new one is written, so a kill between the two files loses nothing.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from cptool.files import parse_json, read_bounded
from cptool.session.manifest import Damaged

FORMAT = 2
FILE = "chat.json"
REMEDY = "restore it, or go on with cptool decode"

_LARGEST = 1 << 28


def digest(tokens: Sequence[int]) -> str:
    """Return a name for exactly these tokens."""
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()


def seal(state: dict) -> str:
    """Return the checksum of a state: of the digest of its tokens, the system message and the
    exchanges.
    """
    fields = {name: state[name] for name in ("tokens", "system", "exchanges")}
    return hashlib.sha256(json.dumps(fields, separators=(",", ":")).encode()).hexdigest()


def dump(states: Iterable[dict]) -> bytes:
    """Return the contents of the file, the newest state last."""
    listed = [
        {"sha256": seal(state), **{name: state[name] for name in ("tokens", "system", "exchanges")}}
        for state in states
    ]
    return json.dumps({"format": FORMAT, "states": listed}).encode()


def read(directory: Path) -> dict[str, dict]:
    """Return the states in the session's file by their seals, the newest last; none if the file is
    missing.

    Damaged if a single byte of it is not as it was written.
    """
    path = directory / FILE
    try:
        data = read_bounded(path, _LARGEST)
        found = parse_json(data)
        version = found["format"]
        if type(version) is not int or version != FORMAT:
            raise ValueError(f"it has format {version!r:.40}, this cptool reads format {FORMAT}")
        for state in found["states"]:
            _check(state)
        if dump(found["states"]) != data:
            raise ValueError("its checksum is that of something else")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is not a readable conversation ({error}); {REMEDY}") from None
    return {state["sha256"]: state for state in found["states"]}


def problems(directory: Path, sealed: Sequence[str]) -> list[str]:
    """Return what is wrong with the file of a session whose manifest seals these states, one line
    each.
    """
    path = directory / FILE
    try:
        states = read(directory)
    except Damaged as error:
        return [str(error)]
    if not sealed and states:
        return [f"{path} belongs to no conversation of this session; remove it"]
    if all(each in states for each in sealed):
        return []
    fault = "is missing" if not path.exists() else "is not as it was written with the manifest"
    return [f"{path} {fault}; {REMEDY}"]


def _check(state: dict) -> None:
    if not isinstance(state, dict) or state.keys() != {"sha256", "tokens", "system", "exchanges"}:
        raise ValueError("a state of it has other parts than it must have")
    exchanges, system = state["exchanges"], state["system"]
    texts = [state["sha256"], state["tokens"], *([] if system is None else [system])]
    for exchange in exchanges if isinstance(exchanges, list) else [None]:
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise ValueError("a state of it has parts of the wrong type")
        texts += exchange
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a state of it has parts of the wrong type")
    if state["sha256"] != seal(state):
        raise ValueError("its checksum is that of something else")
