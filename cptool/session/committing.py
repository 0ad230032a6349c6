"""Committing a turn: one atomic step, whatever else writes to the session at the same time."""

import contextlib
import fcntl
import os
import secrets
import shlex
import shutil
from collections import abc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cptool import files
from cptool.errors import RunError
from cptool.session import chat_file
from cptool.session.chat_history import advanced
from cptool.session.chat_state import State
from cptool.session.dialogue import Dialogue
from cptool.session.manifest import SEGMENT_NAME, Damaged, Manifest
from cptool.session.manifest_format import validate
from cptool.session.store import MANIFEST, changed, check_size, exists, is_leftover, read


def commit(directory: Path, manifest: Manifest, chat: Sequence[Dialogue] | None = None) -> Manifest:
    """Make `manifest` the state of the session in one atomic step, and `chat`, if given, that of
    its conversation, by sequence; then remove files that no manifest names and no process holds.
    Return what was committed.

    Raises Refused, and changes nothing, if another run has committed since this one began, or if a
    segment that the manifest names is not there.
    """
    validate(manifest)
    with _locked(directory):
        try:
            previous = read(directory) if exists(directory) else None
            _check_base(directory, manifest, previous)
            for segment in manifest.segments:
                check_size(directory, segment)
        except Damaged as error:
            raise Refused(str(error).partition("; ")[0]) from None
        committed = _replace(directory, manifest, chat, previous)
        _sweep(directory, committed)
    return committed


def _check_base(directory: Path, manifest: Manifest, previous: Manifest | None) -> None:
    """Raise Refused unless `manifest` continues `previous`."""
    began = manifest.revision - 1
    if previous is None and began:
        raise Refused(f"{directory} holds no session any more (this run began at revision {began})")
    if previous is not None and previous.revision != began:
        raise Refused(changed(directory, previous.revision, began))
    if previous is not None and previous.session != manifest.session:
        raise Refused(f"{directory} holds another session by now")


def commit_or_keep(
    directory: Path, manifest: Manifest, chat: Sequence[Dialogue] | None = None
) -> Manifest:
    """Call `commit`; if it is refused, keep the turn as a session of its own beside this one.

    Raises RunError in that case; its message names the place.
    """
    try:
        return commit(directory, manifest, chat)
    except (Refused, FileNotFoundError, NotADirectoryError) as error:
        fault = str(error) if isinstance(error, Refused) else f"{directory} is gone"
    try:
        kept = _keep(directory, manifest, chat)
    except OSError as error:
        raise RunError(
            f"{fault}; nothing of this run was saved, nor can it be beside it ({error.strerror})"
        ) from None
    go_on = "chat" if chat is not None else "decode"
    raise RunError(
        f"{fault}; this run's turn is kept in {kept}, continue it with: "
        f"cptool {go_on} {shlex.quote(str(kept))}"
    )


class Refused(RunError):
    """A commit on top of a state that no longer exists."""


def _replace(
    directory: Path, manifest: Manifest, chat: Sequence[Dialogue] | None, previous: Manifest | None
) -> Manifest:
    if chat is not None:
        states: dict[str, State] = {}
        with contextlib.suppress(Damaged):  # what cannot be read cannot be kept
            states = chat_file.read(directory)
        kept = {s: states[s] for s in (previous.chat if previous else ()) if s in states}
        turns, known = advanced(manifest, previous, list(kept.values()), chat)
        new = {state.seal(): state for state in known}
        rest = [state for seal, state in kept.items() if seal not in new]
        files.replace_whole(directory / chat_file.FILE, chat_file.dump([*rest, *known]))
        manifest = replace(manifest, turns=turns, chat=tuple(new))
    files.replace_whole(directory / MANIFEST, manifest.dump().encode())
    return manifest


def _keep(directory: Path, manifest: Manifest, chat: Sequence[Dialogue] | None) -> Path:
    """Make the turn a session of its own beside `directory`, and return where.

    Its KV is shared with the session where all of it is still there; otherwise the next turn
    computes it anew.
    """
    name = f"{directory.resolve().name}.revision-{manifest.revision}-{secrets.token_hex(3)}"
    place = directory.resolve().with_name(name)
    own = [s.file for s in manifest.segments if s.revision == manifest.revision]
    try:
        files.make_private(place)
        _fill(place, directory, replace(manifest, session=secrets.token_hex(8)), chat)
    except OSError:
        shutil.rmtree(place, ignore_errors=True)
        raise
    for file in own:
        (directory / file).unlink(missing_ok=True)
    return place


def _fill(
    place: Path, directory: Path, manifest: Manifest, chat: Sequence[Dialogue] | None
) -> None:
    """Make `manifest` the first state of the session in `place`."""
    try:
        for segment in manifest.segments:
            check_size(directory, segment)
            _link(directory / segment.file, place / segment.file)
    except (Damaged, FileNotFoundError, NotADirectoryError):
        for file in place.iterdir():
            file.unlink()
        manifest = manifest.without_kv()
    if manifest.chat and chat is None:
        with contextlib.suppress(Damaged):
            states = chat_file.read(directory)
            if all(seal in states for seal in manifest.chat):
                files.replace_whole(place / chat_file.FILE, chat_file.dump(states.values()))
    if not (place / chat_file.FILE).exists():
        manifest = replace(manifest, chat=())
    _replace(place, manifest, chat, None)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # across file systems, or on one without links
        with source.open("rb") as old, files.create(target) as new:
            shutil.copyfileobj(old, new, 1 << 24)
            os.fsync(new.fileno())


def _sweep(directory: Path, committed: Manifest) -> None:
    """Remove files that earlier runs left: none that the manifest names, none that a running
    process holds, and none of a later revision.
    """
    named = {segment.file for segment in committed.segments}
    for file in list(directory.iterdir()):
        if file.name in named or file.name in (MANIFEST, chat_file.FILE) or not is_leftover(file):
            continue
        segment = SEGMENT_NAME.fullmatch(file.name)
        if segment and (int(segment[1]) > committed.revision or is_held(file)):
            continue
        with contextlib.suppress(OSError):  # not ours to remove; the turn is on disk
            file.unlink()


def is_held(file: Path) -> bool:
    """Return whether a running process holds a file that it has written and not yet committed."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def _locked(directory: Path) -> abc.Iterator[None]:
    """Block other commits to the session while the body runs."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
