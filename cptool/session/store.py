"""KV on disk: append-only segments and an atomically replaced manifest.

A session directory holds `manifest.json` and safetensors segments. A segment is what one rank
computed in one turn: for every layer the K and V of its tokens, with their positions, and perhaps
the logits that follow a sequence's last token. A turn writes new segments, syncs them to disk, and
only then replaces the manifest, so a kill at any moment leaves the previous turn whole. Going back
writes only a manifest, which records the position from which a segment no longer counts. Nothing is
ever unpickled.

Positions identify a segment's tokens, so a session saved on any number of ranks resumes on any: a
sequence's tokens, in the order of the segments, are dealt to the new ranks in equal contiguous
shares, or as they were if as many ranks wrote equal shares.

Two runs may continue one session at the same time. The first to commit wins, and the other one's
turn becomes a session of its own beside it: nothing that was computed is lost. A run keeps a lock
on the segments that it has written until they are committed. Those that no run holds and no
manifest names were left by a run that died, and the next commit removes them.
"""

import contextlib
import os
import re
import stat
from collections import abc
from pathlib import Path
from typing import TYPE_CHECKING

from cptool import files
from cptool.errors import RunError, UserError
from cptool.session import chat_file
from cptool.session.manifest import (
    REMEDY,
    Damaged,
    Manifest,
    ModelIdentity,
    Segment,
)
from cptool.session.manifest_format import parse

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint

MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 1 << 28
_RELOADS = 3

# Files of a session that a killed run may leave; the last is the name under which earlier versions
# had segments written.
_LEFT = re.compile(
    r"segment-\d+-\d+-\d+-[0-9a-f]{8}\.safetensors(\.tmp)?|(manifest|chat)\.json\.[0-9a-f]{8}\.tmp"
    r"|(manifest|chat)\.tmp"
)
_LIBRARY_FILE = re.compile(r"\.tmp[0-9A-Za-z]{6}")


def load(directory: Path, revision: int | None = None) -> Manifest:
    """Read the manifest and check that every segment is there in full length. Raises UserError
    otherwise; RunError if another process has continued the session from `revision`.
    """
    for attempt in range(_RELOADS):
        manifest = read(directory)
        try:
            for segment in manifest.segments:
                check_size(directory, segment)
            break
        except Damaged:
            # Another run may have committed, and removed them, in the meantime.
            if attempt == _RELOADS - 1 or not has_changed(directory, manifest):
                raise
    if revision is not None and manifest.revision != revision:
        raise RunError(
            f"{changed(directory, manifest.revision, revision)}; nothing of this run was saved"
        )
    return manifest


def read(directory: Path) -> Manifest:
    """Return the manifest, validated. Its segments are not looked at.

    Raises UserError if there is none, Damaged if it was changed or is inconsistent.
    """
    path = directory / MANIFEST
    try:
        return parse(files.read_bounded(path, _LARGEST_MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{directory} holds no session ({MANIFEST} is missing); make one with: cptool prefill "
            "MODEL --session DIR"
        ) from None
    except ValueError as error:
        raise Damaged(f"{path} is not a readable session manifest ({error}); {REMEDY}") from None


def has_changed(directory: Path, manifest: Manifest) -> bool:
    """Return whether the session has left the revision of `manifest`."""
    try:
        found = read(directory)
    except (UserError, OSError):
        return False
    return (found.session, found.revision) != (manifest.session, manifest.revision)


@contextlib.contextmanager
def while_read(directory: Path, manifest: Manifest) -> abc.Iterator[None]:
    """Raise RunError if the body finds the segments of `manifest` damaged or missing because
    another process has committed meanwhile.
    """
    try:
        yield
    except Damaged:
        if has_changed(directory, manifest):
            raise RunError(
                f"{directory} was changed by another run while it was read; give the command again"
            ) from None
        raise


def check_size(directory: Path, segment: Segment) -> None:
    """Raise Damaged unless the segment's file is there in full length."""
    file = directory / segment.file
    size = file.stat().st_size if file.is_file() else None
    if size != segment.bytes:
        found = "is missing" if size is None else f"has {size} bytes"
        raise Damaged(f"{file} {found}, the manifest says {segment.bytes} bytes; {REMEDY}")


def exists(directory: Path) -> bool:
    """Return whether there is a session, sound or not."""
    return os.path.lexists(directory / MANIFEST)


def common_prefix(first: abc.Sequence[int], second: abc.Sequence[int]) -> int:
    """Return the number of tokens with which both sequences begin."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def shared_prefixes(
    directory: Path, manifest: Manifest, prompts: list[list[int]], rewind: bool
) -> list[int]:
    """Return how many tokens each whole prompt shares with the session.

    Raises UserError if a prompt does not begin with all tokens of its sequence, unless `rewind`.
    """
    if len(prompts) != len(manifest.sequences):
        raise UserError(
            f"{len(prompts)} prompts for {directory}, which holds {len(manifest.sequences)} "
            "sequences; give one for each, "
            "or name a new directory"
        )
    lengths = []
    for b, (prompt, sequence) in enumerate(zip(prompts, manifest.sequences, strict=True), 1):
        shared = common_prefix(prompt, sequence.tokens)
        if shared < len(sequence.tokens) and not rewind:
            ends = "ends" if shared == len(prompt) else "differs"
            raise UserError(
                f"sequence {b}: the prompt {ends} at token {shared}, {directory} holds "
                f"{len(sequence.tokens)}; a prompt must "
                "begin with all of them: add `rewind` to go back to there, or name a new directory"
            )
        lengths.append(shared)
    return lengths


def check_writable(directory: Path) -> None:
    """Raise UserError for a directory in which the next turn could not be saved."""
    places = (directory, *directory.absolute().parents)
    place = next(p for p in places if os.path.lexists(p))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        fault = "is not writable" if place.is_dir() else "is a file"
        if place.is_symlink() and not place.exists():
            fault = "is a link that leads nowhere"
        raise UserError(
            f"{directory}: {place} {fault}, so no turn can be saved; name another place"
        )


def check_new(directory: Path) -> None:
    """Raise UserError for a directory in which a new session would mix with other files."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file, a session needs a directory; name another place")
    foreign = (
        [p.name for p in directory.iterdir() if not is_leftover(p)] if directory.is_dir() else []
    )
    if foreign:
        raise UserError(
            f"{directory} is not empty (it holds {min(foreign)}); a session needs a directory of "
            "its own"
        )


def model_path(manifest: Manifest) -> str:
    """Return the path of the session's model. Raises UserError if nothing is there any more."""
    path = manifest.model.path
    try:
        gone = not Path(path).exists()
    except (OSError, ValueError):
        gone = True
    if gone:
        raise UserError(
            f"{printable(path)}, the model of this session, is not there any more; say where "
            "it is with `model`"
        )
    return path


def identity(checkpoint: "Checkpoint", fingerprint: str | None = None) -> ModelIdentity:
    """Return what a session records of its model; `fingerprint` is that of the checkpoint if the
    caller knows it.
    """
    config, path = checkpoint.config, checkpoint.path
    # A file keeps its name, by which the parts of a split model find each other.
    path = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    return ModelIdentity(
        path=str(path),
        fingerprint=fingerprint or checkpoint.fingerprint,
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
    )


def check_model(manifest: Manifest, model: ModelIdentity) -> None:
    """Raise UserError if the session's KV is another model's."""
    ours = manifest.model
    if ours.fingerprint != model.fingerprint:
        raise UserError(
            f"{model.path} is not the model of this session (fingerprint {model.fingerprint[:12]}, "
            f"the session's is {ours.fingerprint[:12]}); name the one that it was made with, as "
            f"{printable(ours.path)} was, or make a new session"
        )
    for name in ("layers", "kv_heads", "head_dim", "vocab_size"):
        if getattr(ours, name) != getattr(model, name):
            raise Damaged(
                f"the session's manifest says {name} {getattr(ours, name)}, its model "
                f"{model.path} has {getattr(model, name)}; {REMEDY}"
            )


def printable(path: str) -> str:
    """Return a path read from a file, without characters that a terminal would interpret."""
    return path if path.isprintable() else ascii(path)


def changed(directory: Path, found: int, began: int) -> str:
    """Return the message for two processes that continued the same revision."""
    return (
        f"{directory} was changed by another run (it is at revision {found}, this run began at "
        f"{began})"
    )


def is_leftover(path: Path) -> bool:
    """Return whether a run of cptool may have left this in a directory without a session, or before
    its turn was committed.
    """
    if path.name == chat_file.FILE or _LEFT.fullmatch(path.name):
        return True
    return _LIBRARY_FILE.fullmatch(path.name) is not None and _is_segment_like(path)


def _is_segment_like(path: Path) -> bool:
    """Return whether a file begins as a segment does, or is empty."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with path.open("rb") as file:
            data = file.read(256)
    except OSError:
        return False
    tensors = (b'"kv.', b'"positions"', b'"logits.')
    return not data or any(name in data for name in tensors)
