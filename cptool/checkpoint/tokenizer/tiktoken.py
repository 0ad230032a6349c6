"""Ranked byte strings: the `tokenizer.model` of Llama 3, in the text format of tiktoken.

A line is a token in base64 and its rank, which is its id. Special tokens follow, by convention.
"""

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path

from cptool.errors import UserError

_NAMED = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    5: "step_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
    11: "image",
}
_SPECIAL_COUNT = 256


@dataclass(frozen=True)
class RankedModel:
    """Tokens by id, the lowest of which merges first, then `special` ones (Llama 3.1's names)."""

    tokens: list[bytes]
    special: list[str]

    def special_id(self, name: str) -> int:
        """Return the id of the special token `<|name|>`."""
        return len(self.tokens) + self.special.index(f"<|{name}|>")


def parse(path: Path, data: bytes) -> RankedModel:
    """Return the model that `data`, the content of `path`, describes; UserError if damaged."""
    try:
        rows = [line.split() for line in data.splitlines() if line]
        tokens = [base64.b64decode(token, validate=True) for token, _ in rows]
        if [int(rank) for _, rank in rows] != list(range(len(rows))):
            raise ValueError("ranks do not count from 0")
        distinct = set(tokens)
        if len(distinct) != len(tokens) or b"" in distinct:
            raise ValueError("a token is empty or there twice")
        if missing := [byte for byte in range(256) if bytes([byte]) not in distinct]:
            raise ValueError(f"no token for byte {missing[0]}")
    except (ValueError, binascii.Error) as error:
        raise UserError(
            f"{path}: neither a SentencePiece model nor whole lines of base64 and rank ({error}); "
            f"fetch the file again"
        ) from None
    reserved = iter(range(_SPECIAL_COUNT))
    names = (
        _NAMED[i] if i in _NAMED else f"reserved_special_token_{next(reserved)}"
        for i in range(_SPECIAL_COUNT)
    )
    return RankedModel(tokens, [f"<|{name}|>" for name in names])
