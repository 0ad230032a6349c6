"""Reading prompts from files and standard input: text, or token ids in JSON."""

import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from cptool.errors import UserError

STANDARD_INPUT = "-"
"""In place of a text or a file: read standard input."""

# What a file of token ids takes beside its ids: ten digits and an indented line for each, and a
# batch of several sequences.
_ID_BYTES, _IDS_FILE_BYTES = 64, 64 << 20

_CORPUS_BYTES = 1 << 28


def join_parts(parts: Sequence[str]) -> str:
    """Return the texts of one prompt, such as a document and a question, with a blank line between
    two of them.
    """
    return "\n\n".join(parts)


def read_text(path: str | Path, context: int) -> str:
    """Return the text as it stands: no line end is changed; a byte order mark is none of it."""
    data = _read_regular(Path(path), "a text file, or - for standard input", _most_bytes(context))
    return _as_text(data, str(path), context)


def read_corpus(path: str | Path) -> str:
    """Return the text of a file that may be longer than any context, as `read_text` does."""
    data = _read_regular(Path(path), "a text file", _CORPUS_BYTES)
    if len(data) > _CORPUS_BYTES:
        raise UserError(f"{path} has more than {_CORPUS_BYTES:,} bytes; give a part of it")
    return _decoded(data, str(path))


def read_stdin(context: int) -> str:
    """Return the text of standard input up to its end, as `read_text` does a file's.

    Raises UserError in one of several processes of a launcher, which share a standard input.
    """
    from cptool.distributed.environment import launched_size

    if (launched_size() or 1) > 1:
        raise UserError(
            "-: the processes of a launcher share one standard input; name a file instead"
        )
    if sys.stdin is None:  # closed from the beginning
        return ""
    return _as_text(sys.stdin.buffer.read(_most_bytes(context) + 1), "standard input", context)


def _most_bytes(context: int) -> int:
    # No vocabulary has tokens of so many bytes that a text of this size is of `context` tokens.
    return (context << 10) + (1 << 20)


def _as_text(data: bytes, name: str, context: int) -> str:
    _check_size(data, name, _most_bytes(context), context)
    return _decoded(data, name)


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {error.start}); convert it first"
        ) from None


def _read_regular(path: Path, kind: str, limit: int) -> bytes:
    """Return the bytes of a file, one more than `limit` of a larger one."""
    try:
        # A FIFO that nobody writes to would block.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise UserError(f"{path} is not a regular file; name {kind}")
            return file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name {kind}") from None


def _check_size(data: bytes, name: str, limit: int, context: int) -> None:
    if len(data) > limit:
        raise UserError(
            f"{name} has more than {limit:,} bytes, far more than the model's context of "
            f"{context:,} tokens; shorten it, or give --context-length if the model was made for "
            f"more"
        )


def read_token_ids(path: str | Path, context: int) -> list[tuple[str, list[int]]]:
    """Return names and token ids of the sequences of a file."""
    limit = _IDS_FILE_BYTES + _ID_BYTES * context
    data = _read_regular(Path(path), "a JSON file of token ids", limit)
    _check_size(data, str(path), limit, context)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); it must be a list of token ids") from None
    rows = (
        value
        if isinstance(value, list) and value and all(isinstance(row, list) for row in value)
        else [value]
    )
    for row in rows:
        if not isinstance(row, list) or not all(type(token) is int for token in row):
            raise UserError(
                f"{path}: token ids must be a list of integers, or a list of such lists"
            )
    names = (
        [str(path)]
        if len(rows) == 1
        else [f"{path}, sequence {b}" for b in range(1, len(rows) + 1)]
    )
    return list(zip(names, rows, strict=True))
