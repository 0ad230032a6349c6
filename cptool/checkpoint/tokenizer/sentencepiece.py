"""SentencePiece models: the `tokenizer.model` of Llama 1, Llama 2 and Code Llama.

The file is a protocol buffer (sentencepiece_model.proto); what is read of it:

    ModelProto       1 pieces (repeated), 2 trainer_spec, 3 normalizer_spec
    SentencePiece    1 piece, 2 score, 3 type
    TrainerSpec      3 model_type, 24 treat_whitespace_as_suffix, 35 byte_fallback, 40 unk_id,
                     41 bos_id, 42 eos_id
    NormalizerSpec   2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces,
                     5 escape_whitespaces
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cptool.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces; GGUF has the same."""

_BPE = 2

# Code Llama's for infilling and for turns. The file has some as normal pieces, so that a user's
# text could hold them.
_CODE_CONTROL = {"▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "<step>"}

# (field, default where the file says nothing, what cptool encodes by)
_TRAINER = {
    "model_type": (3, 1, _BPE),
    "treat_whitespace_as_suffix": (24, 0, 0),
    "byte_fallback": (35, 0, 1),
}
_NORMALIZER = {
    "precompiled_charsmap": (2, b"", b""),
    "remove_extra_whitespaces": (4, 1, 0),
    "escape_whitespaces": (5, 1, 1),
}


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """Pieces by id with their scores and types; `dummy_prefix` puts a space before a text."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    bos_id: int
    eos_id: int
    dummy_prefix: bool


def parse(path: Path, data: bytes) -> SentencePieceModel:
    """Return the model that `data`, the content of `path`, describes.

    Raises UserError if it is damaged, or has an encoding that no Llama has: other than BPE with
    bytes for unknown characters.
    """
    try:
        fields = list(_fields(data))
        trainer = {n: v for number, spec in fields if number == 2 for n, v in _fields(spec)}
        normalizer = {n: v for number, spec in fields if number == 3 for n, v in _fields(spec)}
        pieces, scores, types = _pieces([value for number, value in fields if number == 1])
        bos_id, eos_id = trainer.get(41, 1), trainer.get(42, 2)
        if len(set(pieces)) != len(pieces) or not {bos_id, eos_id} <= set(range(len(pieces))):
            raise ValueError(f"{len(set(pieces))} different pieces of {len(pieces)}")
    except (ValueError, TypeError, IndexError, struct.error) as error:
        raise UserError(
            f"{path}: not a SentencePiece model, or a damaged one ({error}); fetch the file again"
        ) from None
    for spec, known in ((trainer, _TRAINER), (normalizer, _NORMALIZER)):
        for key, (number, default, expected) in known.items():
            if (value := spec.get(number, default)) != expected:
                raise UserError(
                    f"{path}: {key} is {value!r:.40}, cptool reads SentencePiece models where it "
                    f"is {expected!r}; write a tokenizer.json with transformers"
                )
    for piece, kind in zip(pieces, types, strict=True):
        if kind in (USER_DEFINED, UNUSED):
            raise UserError(
                f"{path}: piece {piece!r} is of type {kind}, which no Llama has; write a "
                f"tokenizer.json with transformers"
            )
    return SentencePieceModel(
        pieces=pieces,
        scores=scores,
        types=types,
        bos_id=bos_id,
        eos_id=eos_id,
        dummy_prefix=bool(normalizer.get(3, 1)),
    )


def _pieces(messages: list[bytes]) -> tuple[list[str], list[float], list[int]]:
    """Texts, scores and types of the pieces."""
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    for message in messages:
        fields = dict(_fields(message))
        for number, kind in ((1, bytes), (2, bytes), (3, int)):
            if not isinstance(fields.get(number, kind()), kind):
                raise ValueError(f"field {number} of piece {len(pieces)} is of another wire type")
        piece = fields.get(1, b"").decode("utf-8")
        pieces.append(piece)
        scores.append(struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0)
        types.append(CONTROL if piece in _CODE_CONTROL else fields.get(3, NORMAL))
    return pieces, scores, types


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a message: an int, or the bytes of anything else."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            number_value, position = _varint(message, position)
            yield number, number_value
            continue
        if wire_type == 2:
            length, position = _varint(message, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        value = message[position : position + length]
        if len(value) != length:
            raise ValueError(f"a field of {length} bytes, {len(value)} left")
        position += length
        yield number, value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Return an integer in groups of seven bits, lowest first, and the position behind it."""
    value = message[position]
    position += 1
    if value < 0x80:
        return value, position
    value, shift = value & 0x7F, 7
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("an integer of more than 64 bits")
