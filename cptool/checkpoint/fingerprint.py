"""The fingerprint of a checkpoint: which model it is, by every byte of its tensors.

Reading all bytes takes as long as the disk or SHA-256 does, so a fingerprint is remembered in the
cache directory. The name of its entry is a digest of where the tensors are stored and of each
file's device, inode, size and times: what changes any of them is read anew.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from cptool import files
from cptool.checkpoint.tensors import AnyTensor, byte_ranges, parts
from cptool.errors import RunError, UserError
from cptool.files import cache_dir
from cptool.model.config import LlamaConfig, RopeScaling

_BLOCK = 1 << 25
"""Bytes of a tensor that one thread reads and digests at a time."""

_PIECE = 1 << 20
_SETTLED_NS = 2 * 10**9
"""How old a file's times must be to tell a later change from it: the coarsest clock of a file
system has 2 s."""

_MOST_ENTRIES = 1024
_PATIENCE_S = 120.0


class Model(Protocol):
    """What a fingerprint is taken of: a `Checkpoint`."""

    path: Path
    config: LlamaConfig
    stored: dict[str, AnyTensor]


def fingerprint(checkpoint: Model, opened: str) -> str:
    """Return a hex SHA-256 that tells models apart, whatever their path or their split into files.

    It covers the configuration and, for every tensor in order of name, the name, the shape, the
    encoding and all stored bytes. The context limit is no part of it: KV does not depend on it.
    `opened` is the `state` of the files that were opened. Raises RunError if they have changed
    since, or change while they are read.
    """
    paths = _paths(checkpoint)
    before, began = _identities(paths), time.time_ns()
    key = _key(checkpoint, paths, before)
    if key != opened:
        raise RunError(f"{checkpoint.path} was changed since it was opened; give the command again")
    with _entry(key) as entry:
        if entry is not None and (known := _remembered(entry, key)):
            return known
        found = _digest(checkpoint)
        if _identities(paths) != before:
            raise RunError(f"{checkpoint.path} changed while it was read; give the command again")
        if entry is not None and _settled(before, began):
            _remember(entry, key, found)
    return found


def state(checkpoint: Model) -> str:
    """Return a digest of where the tensors are and of the identity of their files.

    It changes with the files on this machine; nothing of the tensors is read.
    """
    paths = _paths(checkpoint)
    return _key(checkpoint, paths, _identities(paths))


def bytes_to_read(checkpoint: Model, opened: str) -> int:
    """Return the number of bytes that `fingerprint` would read now: 0 if it is remembered."""
    try:
        if _remembered(cache_dir() / "fingerprints" / opened, opened):
            return 0
    except (OSError, UserError):
        pass
    return sum(tensor.nbytes for tensor in checkpoint.stored.values())


def _paths(checkpoint: Model) -> list[Path]:
    return sorted({part.file for tensor in checkpoint.stored.values() for part in parts(tensor)})


def _digest(checkpoint: Model) -> str:
    tensors = sorted(checkpoint.stored.items())
    blocks = [
        (tensor, start, min(start + _BLOCK, tensor.nbytes))
        for _, tensor in tensors
        for start in range(0, tensor.nbytes, _BLOCK)
    ]
    with contextlib.ExitStack() as opened:
        descriptors: dict[Path, int] = {}
        for _, tensor in tensors:
            for part in parts(tensor):
                if part.file not in descriptors:
                    file = opened.enter_context(part.file.open("rb", buffering=0))
                    descriptors[part.file] = file.fileno()

        def digest(block: tuple[AnyTensor, int, int]) -> bytes:
            found, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE))
            for path, offset, count in byte_ranges(*block):
                for at in range(offset, offset + count, _PIECE):
                    piece = buffer[: min(_PIECE, offset + count - at)]
                    _read(descriptors[path], piece, at, path)
                    found.update(piece)
            return found.digest()

        with ThreadPoolExecutor(_threads(), "cptool-digest") as pool:
            digests = pool.map(digest, blocks)
            whole = hashlib.sha256(_configuration(checkpoint).encode())
            for name, tensor in tensors:
                whole.update(json.dumps([name, tensor.shape, tensor.encoding]).encode())
                for _ in range(0, tensor.nbytes, _BLOCK):
                    whole.update(next(digests))
    return whole.hexdigest()


def _read(descriptor: int, piece: memoryview, at: int, path: Path) -> None:
    while len(piece):
        count = os.preadv(descriptor, [piece], at)
        if not count:
            raise RunError(f"{path} changed while it was read; give the command again")
        piece, at = piece[count:], at + count


def _threads() -> int:
    from cptool.host.affinity import usable_cpus

    return max(1, min(16, len(usable_cpus())))


def _configuration(checkpoint: Model) -> str:
    """Return what the configuration says, without fields that hold their default: fields have been
    added, and where they do, the model is what it was before.
    """
    said = _set(checkpoint.config, "rope_scaling")
    del said["max_position_embeddings"]
    if (scaling := checkpoint.config.rope_scaling) is not None:
        said["rope_scaling"] = _set(scaling, *_FIRST_OF_SCALING)
        if scaling.kind == "longrope":
            said["rope_scaling"]["factors"] = scaling.factors(
                checkpoint.config.max_position_embeddings
            )
    return json.dumps(said, sort_keys=True)


_FIRST_OF_SCALING = ("low_freq_factor", "high_freq_factor", "original_context")


def _set(record: LlamaConfig | RopeScaling, *always: str) -> dict[str, Any]:
    """Return the fields of a record that differ from their defaults, and those named `always`."""
    return {
        entry.name: getattr(record, entry.name)
        for entry in fields(record)
        if entry.name in always or getattr(record, entry.name) != entry.default
    }


def _identities(paths: list[Path]) -> list[tuple[int, ...]]:
    """Return what identifies each file and its last change.

    The time of the last change of status cannot be set by a program, as that of the last write can.
    """
    found = [path.stat() for path in paths]
    return [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found]


def _settled(identities: list[tuple[int, ...]], began: int) -> bool:
    """Return whether the files' times show every write since `began`, when these were taken."""
    settled = began - _SETTLED_NS
    return all(written < settled and changed < settled for *_, written, changed in identities)


def _key(checkpoint: Model, paths: list[Path], identities: list[tuple[int, ...]]) -> str:
    number = {path: i for i, path in enumerate(paths)}
    layout = [
        [name, tensor.shape, tensor.encoding, getattr(tensor, "dim", None)]
        + [[number[part.file], part.offset, part.nbytes] for part in parts(tensor)]
        for name, tensor in sorted(checkpoint.stored.items())
    ]
    text = json.dumps([1, _configuration(checkpoint), layout, identities])
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def _entry(key: str) -> Iterator[Path | None]:
    """Where the fingerprint of `key` is remembered, None if nothing can be.

    Other processes block meanwhile if they need the same one, so that ranks of a launcher read a
    checkpoint once.
    """
    with contextlib.ExitStack() as held:
        try:
            folder = cache_dir() / "fingerprints"
            files.make_private(folder)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            lock = os.open(folder / f"lock-{key[:2]}", flags, 0o600)
            held.callback(os.close, lock)
            _lock(lock)
        except (OSError, UserError):
            yield None
            return
        yield folder / key


def _lock(descriptor: int) -> None:
    """Return with the lock, or without it if its holder takes too long.

    The holder may have been stopped, and a checkpoint that is read twice costs only time.
    """
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.02)


def _remembered(entry: Path, key: str) -> str | None:
    try:
        if entry.lstat().st_uid != os.getuid():
            return None
        found = files.read_bounded(entry, 256).decode("ascii").split()
    except (OSError, ValueError):
        return None
    return found[0] if len(found) == 2 and found[1] == _check(key, found[0]) else None


def _remember(entry: Path, key: str, found: str) -> None:
    with contextlib.suppress(OSError):
        _forget_old(entry.parent)
        files.replace_whole(entry, f"{found} {_check(key, found)}\n".encode())


def _check(key: str, found: str) -> str:
    return hashlib.sha256(f"{key} {found}".encode()).hexdigest()


def _forget_old(folder: Path) -> None:
    entries = [path for path in folder.iterdir() if not path.name.startswith("lock-")]
    if len(entries) >= _MOST_ENTRIES:
        entries.sort(key=_last_write)
        for path in entries[: len(entries) - _MOST_ENTRIES // 2]:
            path.unlink(missing_ok=True)


def _last_write(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
