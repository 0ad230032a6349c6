"""The conversation of a session on disk: `chat.json`, beside the manifest that seals it.

The file holds states of the conversation, each with a checksum of its own, which the manifest
repeats for those that belong to the session: the state after each turn, as far as it is known.
States that belong to the committed manifest stay while a new one is written, so a kill between the
two files loses nothing. A state lists only the messages that it does not share with the one before.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cptool.files import parse_json, read_bounded
from cptool.session.chat_state import State, old_fields, old_state
from cptool.session.dialogue import Dialogue, Message
from cptool.session.manifest import Damaged

FORMAT = 3
OLD_FORMAT = 2
"""One conversation of questions and answers; its states may also stand in a newer file."""

FILE = "chat.json"
REMEDY = "restore it, or go on without the conversation: cptool decode --raw"

_LARGEST = 1 << 28
_OLD_FIELDS = {"sha256", "tokens", "system", "exchanges"}


def dump(states: Iterable[State], version: int = FORMAT) -> bytes:
    """Return the contents of the file, the newest state last."""
    listed: list[dict[str, Any]] = []
    before: tuple[Dialogue, ...] = ()
    for state in states:
        if state.lengths is None:
            listed.append({"sha256": state.seal(), **old_fields(state)})
            continue
        listed.append(
            {
                "sha256": state.seal(),
                "lengths": list(state.lengths),
                "tokens": list(state.tokens),
                "dialogues": [
                    _fields(dialogue, _same_place(before, b))
                    for b, dialogue in enumerate(state.dialogues)
                ],
            }
        )
        before = state.dialogues
    return json.dumps({"format": version, "states": listed}).encode()


def read(directory: Path) -> dict[str, State]:
    """Return the states in the session's file by their seals, the newest last; none if the file is
    missing.

    Damaged if a single byte of it is not as it was written.
    """
    path = directory / FILE
    try:
        data = read_bounded(path, _LARGEST)
        found = parse_json(data)
        version = found["format"]
        if type(version) is not int or version not in (OLD_FORMAT, FORMAT):
            raise ValueError(f"it has format {version!r:.40}, this cptool reads format {FORMAT}")
        states: dict[str, State] = {}
        before: tuple[Dialogue, ...] = ()
        for fields in found["states"]:
            state = _state(fields, before)
            if version == OLD_FORMAT and state.lengths is not None:
                raise ValueError("a state of it is of a later format")
            states[fields["sha256"]] = state
            before = before if state.lengths is None else state.dialogues
        if dump(states.values(), version) != data:
            raise ValueError("its checksum is that of something else")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Damaged(f"{path} is not a readable conversation ({error}); {REMEDY}") from None
    return states


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


def _same_place(before: tuple[Dialogue, ...], b: int) -> tuple[Message, ...]:
    """Return the messages of sequence b in the state before, none if it had fewer sequences."""
    return before[b].messages if b < len(before) else ()


def _fields(dialogue: Dialogue, before: tuple[Message, ...]) -> dict[str, Any]:
    mine = dialogue.messages
    pairs = zip(mine, before, strict=False)
    least = min(len(mine), len(before))
    kept = next((i for i, (a, b) in enumerate(pairs) if a != b), least)
    added = [list(message) for message in mine[kept:]]
    return {"kept": kept, "added": added, "answer": dialogue.answer}


def _state(fields: Any, before: tuple[Dialogue, ...]) -> State:
    """Return a state of the file. Raises ValueError if it is not as it was sealed."""
    if isinstance(fields, dict) and fields.keys() == _OLD_FIELDS:
        state = _old(fields)
    elif isinstance(fields, dict) and fields.keys() == {"sha256", "lengths", "tokens", "dialogues"}:
        lengths = _listed(fields["lengths"], int)
        dialogues = [
            _dialogue(each, _same_place(before, b))
            for b, each in enumerate(_listed(fields["dialogues"], dict))
        ]
        tokens = _listed(fields["tokens"], str)
        if not len(lengths) == len(tokens) == len(dialogues):
            raise ValueError("a state of it has parts of different lengths")
        state = State(tuple(tokens), tuple(lengths), tuple(dialogues))
    else:
        raise ValueError("a state of it has other parts than it must have")
    if fields["sha256"] != state.seal():
        raise ValueError("its checksum is that of something else")
    return state


def _dialogue(fields: dict[str, Any], before: tuple[Message, ...]) -> Dialogue:
    kept, answer = fields["kept"], fields["answer"]
    if fields.keys() != {"kept", "added", "answer"}:
        raise ValueError("a state of it has other parts than it must have")
    for number in (kept, 0 if answer is None else answer):
        if type(number) is not int or number < 0:
            raise ValueError("a state of it has parts of the wrong type")
    if kept > len(before):
        raise ValueError("a state of it keeps messages that the one before does not have")
    added = [_pair(each) for each in _listed(fields["added"], list)]
    return Dialogue((*before[:kept], *added), answer)


def _old(fields: dict[str, Any]) -> State:
    system, exchanges = fields["system"], _listed(fields["exchanges"], list)
    _listed([fields["tokens"], *([] if system is None else [system])], str)
    return old_state(fields["tokens"], system, [_pair(each) for each in exchanges])


def _pair(value: list) -> tuple[str, str]:
    if len(value) != 2:
        raise ValueError("a state of it has parts of the wrong type")
    first, second = _listed(value, str)
    return first, second


def _listed(value: Any, kind: type) -> list:
    """Return a list of `kind`. Raises ValueError if it is something else."""
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise ValueError("a state of it has parts of the wrong type")
    return value
