"""The file of answers: a line per prompt, in order, appended so that a killed run loses one batch.

Every line says which prompt it answers and how, so that the same command can go on after it.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from cptool import files
from cptool.cli import draw, json_output
from cptool.errors import RunError, UserError
from cptool.units import some

_NAMES = {
    "schema": "format",
    "index": "number",
    "id": "id",
    "prompt_tokens": "prompt",
    "prompt_sha256": "prompt",
    "max_tokens": "limit of tokens",
    "fingerprint": "model",
    "stop": "list of stop texts",
    "top_logprobs": "--logprobs",
    "top_prompt_logprobs": "--prompt-logprobs",
}
"""What a field that identifies an answer is called in an error, where not by its name."""

_ZEROS = (
    "zero bytes follow its first {}, as a crash of the machine leaves them; they were removed, and "
    "the run goes on from there"
)

Origin = Mapping[str, Any]
"""The fields that identify an answer: which prompt it answers, and how."""


class Answers(Protocol):
    """Where answers go. `done` of the prompts were answered by earlier runs."""

    @property
    def done(self) -> int: ...

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the answers that follow. Raises RunError or OSError if that is not possible."""


class Printed:
    """Answers on standard output."""

    done = 0

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Print the answers that follow."""
        for fields in lines:
            json_output.print_object(fields)
        sys.stdout.flush()


class Kept:
    """Answers in a file that is open and locked for this run."""

    def __init__(self, file: BinaryIO, path: Path, done: int) -> None:
        self._file, self._path, self.done = file, path, done

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the answers that follow and block until they are on disk."""
        end = self._file.seek(0, os.SEEK_END)
        data = "".join(json_output.line(fields) + "\n" for fields in lines).encode()
        try:
            files.write_all(self._file, data)
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)
            raise RunError(f"{self._path} cannot be written ({error.strerror})") from None


def check_writable(path: Path) -> None:
    """Raise UserError, before the run, for a file that could not be written."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UserError(f"--output {path}: {parent} is not a directory; create it first")
    if path.is_symlink() and not path.exists():
        target = Path(os.path.realpath(path))
        parent = target.parent
        if not parent.is_dir():
            raise UserError(
                f"--output {path} is a link to {target}, whose folder does not exist; create it, "
                "or name another file"
            )
    if path.exists() and not path.is_file():
        raise UserError(f"--output {path} is not a regular file; - is standard output")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise UserError(f"--output {path} cannot be written; name another file")


@contextmanager
def kept_in(path: Path, origins: Sequence[Origin]) -> Iterator[Kept]:
    """Open the file and check that what is there answers the first prompts, in the same way.

    origins: what identifies the answer of each prompt. A last line that was cut off is removed,
    and what follows answers from a zero byte on. Raises UserError for anything else in the file,
    which is left as it is.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    made = not path.exists()
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise UserError(
            f"--output {path} cannot be written ({error.strerror}); name another file"
        ) from None
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError(f"--output {path} is not a regular file; name another one")
        _lock(file, path)
        if made:
            files.sync(Path(os.path.realpath(path)).parent)
        done, end, fault = _checked(path, origins)
        if fault:
            draw.say(f"{path}: {fault}")
            file.truncate(end)
        yield Kept(file, path, done)


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"--output {path}: another run is writing it; wait for its end, or name another file"
        ) from None
    except OSError:  # a file system without locks
        return


def _checked(path: Path, origins: Sequence[Origin]) -> tuple[int, int, str]:
    """Return how many answers the file has, where the last one ends, in bytes, and why what follows
    it is to be removed, if something does.
    """
    done = end = 0
    with open(path, "rb") as file:
        for row in file:
            expected = origins[done] if done < len(origins) else None
            if done and b"\0" in row:  # which no line of JSON has
                return done, end, _ZEROS.format(some(done, "answer"))
            if not row.endswith(b"\n") and expected is not None and _cut(row, expected):
                return done, end, "its last line was cut off; that prompt is answered again"
            if expected is None:
                raise UserError(
                    f"{path} has more answers than the {len(origins):,} prompts; give the file of "
                    "prompts that it was made from, or name another output"
                )
            _check(f"{path}, line {done + 1}", row, expected)
            done, end = done + 1, end + len(row)
    return done, end, ""


def _cut(row: bytes, expected: Origin) -> bool:
    """Return whether a row is the beginning of the answer that is expected there."""
    start = json_output.line({"index": expected["index"]}).removesuffix("}").encode() + b","
    row = row.rstrip(b"\0")  # of a machine that went down
    return start.startswith(row) or row.startswith(start)


def _check(where: str, row: bytes, expected: Origin) -> None:
    """Raise UserError unless the row is the answer that is expected there."""
    remedy = "name another output"
    try:
        found = json.loads(row)
        if not isinstance(found, dict) or not {*expected, "token_ids"} <= set(found):
            raise ValueError
    except (ValueError, RecursionError):
        raise UserError(
            f"{where} is not an answer that --batch-file wrote; {remedy}, or delete that line and "
            "those after it"
        ) from None
    wanted = json.loads(json_output.line(expected))
    for name, value in wanted.items():
        if found[name] != value:
            what = _NAMES.get(name, name)
            how = _difference(found[name], value)
            raise UserError(f"{where}: its {what} is not that of this run{how}; {remedy}")


def _difference(found: Any, wanted: Any) -> str:
    """Return what an answer has and what this run has, where it is short enough to be read."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        parts = [
            f"{name} {found.get(name)}, here {value}"
            for name, value in wanted.items()
            if found.get(name) != value
        ]
        return f" ({'; '.join(parts)})" if parts else ""
    if max(len(str(value)) for value in (found, wanted)) > 40:
        return ""
    return f" ({json_output.shown(found)}, here {json_output.shown(wanted)})"
