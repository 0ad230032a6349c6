"""The lines of a file of prompts, read, checked and encoded before anything is computed."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from cptool.cli import draw
from cptool.cli.json_output import shown
from cptool.cli.options.prompt_files import STANDARD_INPUT
from cptool.cli.progress import counting
from cptool.errors import UserError, as_options
from cptool.units import some

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.cli.options.prompts import Prompts

_SHOWN = 5
"""Lines with mistakes that are reported one by one."""

_PROMPTS = ("prompt", "messages", "token_ids")
_OPTIONAL = ("id", "max_tokens", "system")
_FORMAT = 'such as {"prompt": "Who wrote this?"}'


@dataclass(frozen=True, kw_only=True)
class Line:
    """A prompt of the file.

    number: of the line, from 1. index: of the prompt, from 0; draws depend on it. id: the user's.
    tokens: 32-bit integers. continued: whether the answer goes on with their text, as in no chat.
    limit: tokens that its answer may have. ends: tokens that end it.
    """

    number: int
    index: int
    id: str | int | float | None
    tokens: array[int]
    continued: bool
    limit: int
    ends: tuple[int, ...]

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the token ids as 32-bit little-endian integers."""
        tokens = array("i", self.tokens)
        if sys.byteorder == "big":
            tokens.byteswap()
        return hashlib.sha256(tokens.tobytes()).hexdigest()


def read_lines(source: str, checkpoint: Checkpoint, texts: Prompts, count: int) -> list[Line]:
    """Return the prompts of a file, or of standard input; blank lines hold none.

    texts: what becomes of a text: `chat`, `system`, `parse`. count: tokens of an answer where the
    line has no "max_tokens".

    Raises UserError if a line cannot be used; the first few are explained on standard error.
    """
    name = "standard input" if source == STANDARD_INPUT else source
    reader = _Reader(checkpoint, texts, count)
    rows = _read(source, name).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    given = [(number, row) for number, row in enumerate(rows, 1) if row.strip()]
    if not given:
        raise UserError(f"{name} holds no prompts; write one JSON object per line, {_FORMAT}")
    lines: list[Line] = []
    faults: list[tuple[int, str]] = []
    with counting("read the prompts, line", len(given)) as advance:
        for number, row in given:
            try:
                lines.append(reader.read(number, row))
            except UserError as error:
                faults.append((number, " ".join(as_options(str(error)).split())))
            advance()
    if faults:
        _refuse(faults, name, len(given))
    reader.check_options(name)
    return lines


def _refuse(faults: Sequence[tuple[int, str]], name: str, count: int) -> NoReturn:
    """Raise UserError for lines that cannot be used, of `count`. If their reasons differ, the first
    few are explained on standard error.
    """
    reasons = {reason for _, reason in faults}
    if len(reasons) == 1:
        where = _lines([number for number, _ in faults])
        raise UserError(f"{name}, {where}: {reasons.pop()}; nothing was computed")
    for number, reason in faults[:_SHOWN]:
        draw.say(f"{name}, line {number}: {reason}", always=True)
    raise UserError(
        f"{name}: {len(faults):,} lines cannot be used (of {count:,}); correct what is said above; "
        "nothing was computed"
    )


def _read(source: str, name: str) -> bytes:
    if source == STANDARD_INPUT:
        return b"" if sys.stdin is None else sys.stdin.buffer.read()
    try:
        with open(source, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); name a file") from None


class _Reader:
    """Makes a `Line` of the text of each, and counts what is said once for all of them."""

    def __init__(self, checkpoint: Checkpoint, texts: Prompts, count: int) -> None:
        self.checkpoint, self.texts, self.count = checkpoint, texts, count
        self.index = self.plain = 0
        self.numbers: dict[object, int] = {}  # of the lines, by their ids
        self.capped: list[int] = []
        self.spelled: list[int] = []

    def read(self, number: int, row: bytes) -> Line:
        """Return the line of this number; UserError says what is wrong with it."""
        from cptool.checkpoint.tokenizer.input_checks import check_ids

        fields = _parsed(row)
        index, self.index = self.index, self.index + 1
        self._check_id(fields.get("id"), number)
        kind = _kind(fields)
        encode: dict[str, Callable[[Any, Mapping[str, Any], int], list[int]]] = {
            "prompt": self._text,
            "messages": self._messages,
            "token_ids": self._ids,
        }
        tokens = encode[kind](fields[kind], fields, number)
        if not tokens:
            raise UserError("the prompt is empty; give at least one token")
        config = self.checkpoint.config
        check_ids(tokens, config.vocab_size)
        wanted = self.count if fields.get("max_tokens") is None else fields["max_tokens"]
        if type(wanted) is not int or wanted < 1:
            raise UserError(f'"max_tokens" is {shown(wanted)}; it must be a number, 1 or more')
        room = config.max_position_embeddings - len(tokens)
        if room < 1:
            raise UserError(
                f"the prompt has {len(tokens):,} tokens, which leaves no room for an answer in the "
                f"model's context of {config.max_position_embeddings:,}; shorten it, or give "
                "--context-length if the model was made for more"
            )
        if wanted > room:
            self.capped.append(number)
        return Line(
            number=number,
            index=index,
            id=fields.get("id"),
            tokens=array("i", tokens),
            continued=kind == "token_ids" or (kind == "prompt" and not self.texts.chat),
            limit=min(wanted, room),
            ends=self.checkpoint.answer_ends(tokens),
        )

    def check_options(self, name: str) -> None:
        """Raise UserError for options about texts where no line has one; say what was noticed."""
        given = {
            "--chat": self.texts.chat,
            "--parse-control-tokens": self.texts.parse,
        }
        for option, value in given.items():
            if value and not self.plain:
                raise UserError(f'{option}: no line of {name} has a "prompt"; leave it out')
        if self.capped:
            draw.say(
                f"{name}: {_lines(self.capped)}: the context has no room for so many tokens of an "
                "answer; it gets those that fit",
                always=True,
            )
        if self.spelled:
            draw.say(
                f"{name}: {_lines(self.spelled)}: control tokens in the text are read as letters; "
                "--parse-control-tokens reads prompts that were rendered",
                always=True,
            )

    def _check_id(self, given: Any, number: int) -> None:
        if given is None:
            return
        whole = type(given) in (str, int)
        if not whole and (type(given) is not float or not math.isfinite(given)):
            raise UserError(f'"id" is {shown(given)}; it must be a text or a finite number')
        if (before := self.numbers.setdefault(given, number)) != number:
            raise UserError(f'"id" {shown(given)} is that of line {before}; each must be unique')

    @property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = self.checkpoint.tokenizer()
        if tokenizer is None:
            raise UserError(f'{self.checkpoint.path} has no tokenizer; give "token_ids"')
        return tokenizer

    def _text(self, text: Any, fields: Mapping[str, Any], number: int) -> list[int]:
        if not isinstance(text, str):
            raise UserError(f'"prompt" is {shown(text)}; it must be a text')
        if not text:
            raise UserError("the prompt is empty; give at least one character")
        self.plain += 1
        system = fields.get("system")
        if system is None:
            system = self.texts.system
        elif not isinstance(system, str):
            raise UserError(f'"system" is {shown(system)}; it must be a text')
        if self.texts.chat:
            messages = [] if system is None else [{"role": "system", "content": system}]
            return self._tokenizer.chat([*messages, {"role": "user", "content": text}])
        if system is not None:
            raise UserError('"system" is a message of the chat template; add --chat')
        if not self.texts.parse and self._tokenizer.spelled(text):
            self.spelled.append(number)
        return self._tokenizer.encode(text, bos=True, parse=self.texts.parse)

    def _messages(self, messages: Any, fields: Mapping[str, Any], number: int) -> list[int]:
        rule = '{"role": "user", "content": "..."}'
        if not isinstance(messages, list) or not messages:
            raise UserError(f'"messages" must be a list of messages such as {rule}')
        for message in messages:
            if (
                not isinstance(message, dict)
                or set(message) != {"role", "content"}
                or not all(isinstance(value, str) for value in message.values())
            ):
                raise UserError(f"{shown(message)} is not a message, such as {rule}")
        if fields.get("system") is not None:
            raise UserError('"system" goes with "prompt"; put it among the "messages"')
        return self._tokenizer.chat(messages)

    def _ids(self, ids: Any, fields: Mapping[str, Any], number: int) -> list[int]:
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise UserError('"token_ids" must be a list of whole numbers')
        if fields.get("system") is not None:
            raise UserError('"system" goes with "prompt"; leave it out')
        return ids


def _parsed(row: bytes) -> dict[str, Any]:
    """Return the fields of a line; a text alone is a prompt."""
    try:
        value = json.loads(row.decode("utf-8"), object_pairs_hook=_once)
    except UserError:  # a ValueError too
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"it is not UTF-8 text (byte {error.start}); convert it first") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON ({error}); write an object, {_FORMAT}") from None
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise UserError(f"it is {shown(value)}; write an object, {_FORMAT}")
    return value


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's fields; UserError for a name that it has twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"it has {shown(twice)} twice; leave one out")
    return fields


def _kind(fields: Mapping[str, Any]) -> str:
    """Return which field holds the prompt; UserError for fields that are not known."""
    if "body" in fields:
        raise UserError(
            "it is a line of OpenAI's batch format; write the messages of its body alone, "
            "as jq -c '{id: .custom_id, messages: .body.messages}' does"
        )
    if unknown := [name for name in fields if name not in _PROMPTS + _OPTIONAL]:
        known = ", ".join((*_PROMPTS, *_OPTIONAL))
        raise UserError(f"{shown(unknown[0])} is not a field; the fields are {known}")
    kinds = [name for name in _PROMPTS if name in fields]
    if len(kinds) != 1:
        found = f"it has {' and '.join(kinds)}" if kinds else "it has no prompt"
        raise UserError(f"{found}; give one of {', '.join(_PROMPTS)}")
    return kinds[0]


def _lines(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"line {numbers[0]}"
    return f"{some(len(numbers), 'line')}, the first line {numbers[0]}"
