"""KV on disk: append-only segments and an atomically replaced manifest.

A session directory holds `manifest.json` and safetensors segments. A segment is what one rank
computed in one turn: for every layer the K and V of its tokens, with their positions, and perhaps
the logits that follow a sequence's last token. A turn writes new segments, syncs them to disk, and
only then replaces the manifest, so a kill at any moment leaves the previous turn whole. Going back
writes a manifest alone: it says from which position on a segment no longer counts. Nothing is ever
unpickled.

Positions say what a segment is, so a session saved on any number of ranks resumes on any other: a
sequence's tokens, in the order of the segments, are dealt to the new ranks in equal contiguous
shares.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections import abc
from dataclasses import asdict, dataclass, replace
from operator import le
from pathlib import Path

from cptool.errors import RunError, UserError

FORMAT = 1
MANIFEST = "manifest.json"
REMEDY = "restore it or prefill anew"
"""For a session, or a file of one, that is damaged."""


class Damaged(UserError):
    """A session's files are not what was written there."""


@dataclass(frozen=True)
class ModelIdentity:
    """Which model's KV a session holds: where it was, a fingerprint of its contents, and the shape
    of its KV.
    """

    path: str
    fingerprint: str
    layers: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Segment:
    """One file: what CP rank `rank` added to make `revision`, for KV heads [kv_heads[0],
    kv_heads[1]).

    `tokens[b]` tokens of sequence b, of which those at positions in [start[b], until[b]) count.
    """

    file: str
    bytes: int
    sha256: str
    revision: int
    rank: int
    kv_heads: tuple[int, int]
    tokens: tuple[int, ...]
    start: tuple[int, ...]
    until: tuple[int, ...]

    @property
    def live(self) -> bool:
        """Whether any token of it can still count."""
        return any(n and a < z for n, a, z in zip(self.tokens, self.start, self.until))


@dataclass(frozen=True)
class Sequence:
    """Everything said so far, how much of it has KV, the segment with the logits that come next, if
    they are known, and whether the last token ended an answer.
    """

    tokens: tuple[int, ...]
    cached: int
    logits: str | None = None
    ended: bool = False


@dataclass(frozen=True)
class Manifest:
    """The state of a session.

    `revision` counts what was ever committed. `turns[t][b]` is the number of tokens of sequence b
    after turn t + 1.
    """

    model: ModelIdentity
    dtype: str
    cp: int
    tp: int
    revision: int
    turns: tuple[tuple[int, ...], ...]
    sequences: tuple[Sequence, ...]
    segments: tuple[Segment, ...] = ()

    def dump(self) -> str:
        return sealed({"format": FORMAT, **asdict(self)})

    @staticmethod
    def parse(text: str) -> "Manifest":
        """Raises ValueError, KeyError or TypeError if the text is not a manifest of this format, or
        not as it was written.
        """
        fields = json.loads(text)
        seal = fields.pop("sha256", None)  # not there before there were any
        if seal is not None and seal != _checksum(_text(fields)):
            raise ValueError("its checksum is that of something else")
        version = fields.pop("format")
        if version != FORMAT:
            raise ValueError(f"it has format {version}, this cptool reads format {FORMAT}")
        for segment in fields["segments"]:
            if Path(segment["file"]).name != segment["file"]:
                raise ValueError(f"segment {segment['file']!r} is not in the session's directory")
        named = {None, *(segment["file"] for segment in fields["segments"])}
        for sequence in fields["sequences"]:
            if sequence["logits"] not in named:
                raise ValueError(f"logits {sequence['logits']!r} are in none of its segments")
        return Manifest(
            **{
                **fields,
                "model": ModelIdentity(**fields["model"]),
                "sequences": tuple(
                    Sequence(**{**s, "tokens": tuple(s["tokens"])}) for s in fields["sequences"]
                ),
                "turns": tuple(map(tuple, fields["turns"])),
                "segments": tuple(
                    Segment(
                        **{name: tuple(v) if isinstance(v, list) else v for name, v in s.items()}
                    )
                    for s in fields["segments"]
                ),
            }
        )

    def truncated(self, lengths: list[int]) -> "Manifest":
        """The state in which sequence b has said its first `lengths[b]` tokens alone; nothing on
        disk changes.

        Where a sequence gets shorter, what follows its new end is not known any more: the KV of its
        last token is given up, so that the next turn computes it again.
        """
        sequences = tuple(
            s
            if n == len(s.tokens)
            else Sequence(tokens=s.tokens[:n], cached=min(s.cached, max(n - 1, 0)))
            for s, n in zip(self.sequences, lengths, strict=True)
        )
        cached = [sequence.cached for sequence in sequences]
        segments = (replace(s, until=tuple(map(min, s.until, cached))) for s in self.segments)
        wanted = {sequence.logits for sequence in sequences}
        return replace(
            self,
            turns=tuple(turn for turn in self.turns if all(map(le, turn, lengths))),
            sequences=sequences,
            segments=tuple(s for s in segments if s.live or s.file in wanted),
        )


def sealed(fields: dict) -> str:
    """The text of a manifest, with a checksum of all of `fields`."""
    text = _text(fields)
    return f'{{"sha256":"{_checksum(text)}",{text[1:]}'


def _text(fields: dict) -> str:
    return json.dumps(fields, separators=(",", ":"))


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def load(directory: Path, revision: int | None = None) -> Manifest:
    """Reads the manifest and checks that every segment is there in full length. UserError in one
    line otherwise; RunError if another run has taken the session on from `revision`.
    """
    manifest = read(directory)
    for segment in manifest.segments:
        check_size(directory, segment)
    if revision is not None and manifest.revision != revision:
        raise RunError(changed(directory, manifest.revision, revision))
    return manifest


def read(directory: Path) -> Manifest:
    """The manifest, whatever became of its segments. UserError where there is none, Damaged where
    it is not as it was written.
    """
    path = directory / MANIFEST
    try:
        return Manifest.parse(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{directory} holds no session ({MANIFEST} is missing); make one with: cptool prefill "
            "MODEL --session DIR"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} is not a readable session manifest ({error}); {REMEDY}") from None


def check_size(directory: Path, segment: Segment) -> None:
    """Damaged unless the segment's file is there in full length."""
    file = directory / segment.file
    size = file.stat().st_size if file.is_file() else None
    if size != segment.bytes:
        found = "is missing" if size is None else f"has {size} bytes"
        raise Damaged(f"{file} {found}, the manifest says {segment.bytes} bytes; {REMEDY}")


def exists(directory: Path) -> bool:
    """Whether there is a session, sound or not."""
    return (directory / MANIFEST).exists()


def common_prefix(first: abc.Sequence[int], second: abc.Sequence[int]) -> int:
    """The number of tokens that two sequences begin with alike."""
    pairs = zip(first, second)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def shared_prefixes(
    directory: Path, manifest: Manifest, prompts: list[list[int]], rewind: bool
) -> list[int]:
    """How many tokens each whole prompt shares with the session.

    UserError if a prompt does not begin with all that its sequence says, unless `rewind`.
    """
    if len(prompts) != len(manifest.sequences):
        raise UserError(
            f"{len(prompts)} prompts for {directory}, which holds {len(manifest.sequences)} "
            "sequences; give one for each, "
            "or name a new directory"
        )
    lengths = []
    for b, (prompt, sequence) in enumerate(zip(prompts, manifest.sequences), 1):
        shared = common_prefix(prompt, sequence.tokens)
        if shared < len(sequence.tokens) and not rewind:
            ends = "ends" if shared == len(prompt) else "differs"
            raise UserError(
                f"sequence {b}: the prompt {ends} at token {shared}, {directory} holds "
                f"{len(sequence.tokens)}; a prompt must "
                "begin with all of them: add --rewind to go back to there, or name a new directory"
            )
        lengths.append(shared)
    return lengths


def check_writable(directory: Path) -> None:
    """Refuses a place where the next turn could not be saved."""
    place = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        fault = "is not writable" if place.is_dir() else "is a file"
        raise UserError(
            f"{directory}: {place} {fault}, so no turn can be saved; name another place"
        )


def check_new(directory: Path) -> None:
    """Refuses a directory that a new session would mix with other files."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file, a session needs a directory; name another place")
    foreign = [p.name for p in directory.glob("*") if not _is_ours(p)] if directory.is_dir() else []
    if foreign:
        raise UserError(
            f"{directory} is not empty (it holds {foreign[0]}); a session needs a directory of its "
            "own"
        )


def model_path(manifest: Manifest) -> str:
    """Where the session's model was; UserError if it has gone from there."""
    if not Path(manifest.model.path).exists():
        raise UserError(
            f"{manifest.model.path}, the model of this session, is not there any more; say where "
            "it is with --model"
        )
    return manifest.model.path


def check_model(manifest: Manifest, fingerprint: str, model: str) -> None:
    """Refuses another model's KV."""
    if manifest.model.fingerprint != fingerprint:
        raise UserError(
            f"{model} is not the model of this session (fingerprint {fingerprint[:12]}, the "
            f"session's is {manifest.model.fingerprint[:12]}); name the one that it was made with, "
            f"as {manifest.model.path} was, or make a new session"
        )


def commit(directory: Path, manifest: Manifest) -> None:
    """Makes `manifest` the state of the session in one atomic step, then removes files that it does
    not name.

    Raises RunError if another run has committed since this one began.
    """
    with _locked(directory):
        _commit(directory, manifest)


def _commit(directory: Path, manifest: Manifest) -> None:
    path = directory / MANIFEST
    found = Manifest.parse(path.read_text()).revision if path.exists() else 0
    if found != manifest.revision - 1:
        raise RunError(changed(directory, found, manifest.revision - 1))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(manifest.dump())
    sync(temporary)
    sync(directory)  # the segments' names, before the manifest that names them
    temporary.replace(path)
    sync(directory)
    named = {segment.file for segment in manifest.segments}
    for file in directory.glob("segment-*"):
        if file.name not in named:
            file.unlink(missing_ok=True)


def changed(directory: Path, found: int, began: int) -> str:
    """The line that says that two runs continued the same revision."""
    return (
        f"{directory} was changed by another run (it is at revision {found}, this run began at "
        f"{began}); nothing of this run was saved"
    )


@contextlib.contextmanager
def _locked(directory: Path) -> abc.Iterator[None]:
    """Other commits to the session wait until the body is done."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_ours(path: Path) -> bool:
    return path.name.startswith(("segment-", "manifest.", "chat."))


def sync(path: Path) -> None:
    """Returns when the file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
