"""Reading prompts from files: text, or token ids in JSON."""

import json
import os
import stat
from pathlib import Path

from cptool.errors import UserError

# What a file of token ids takes beside its ids: ten digits and an indented line for each, and a
# batch of several sequences.
_ID_BYTES, _IDS_FILE_BYTES = 64, 64 << 20


def read_text(path: Path, context: int) -> str:
    """Return the text as it stands: no line end is changed; a byte order mark is none of it."""
    # No vocabulary has tokens of so many bytes that a text of this size is of `context` tokens.
    data = _read_regular(path, "a text file", (context << 10) + (1 << 20), context)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from None


def _read_regular(path: Path, kind: str, limit: int, context: int) -> bytes:
    """Return the bytes of a file of at most `limit`; others are refused before they are read."""
    try:
        # A FIFO that nobody writes to would block.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise UserError(f"{path} is not a regular file; name {kind}")
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name {kind}") from None
    if len(data) > limit:
        raise UserError(
            f"{path} has more than {limit:,} bytes, far more than the model's context of "
            f"{context:,} tokens; shorten it, or give --context-length if the model was made for "
            f"more"
        )
    return data


def read_token_ids(path: Path, context: int) -> list[tuple[str, list[int]]]:
    limit = _IDS_FILE_BYTES + _ID_BYTES * context
    data = _read_regular(path, "a JSON file of token ids", limit, context)
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
