"""The options that give prompts, and the token ids that they stand for."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cptool.cli import draw
from cptool.cli.options import stack
from cptool.cli.types import TokenCount
from cptool.errors import UserError

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.model.config import LlamaConfig

prompt_options = stack(
    click.option(
        "--prompt",
        "prompts",
        multiple=True,
        metavar="TEXT",
        help="A prompt.",
    ),
    click.option(
        "--prompt-file",
        "prompt_files",
        multiple=True,
        type=click.Path(path_type=Path),
        help="A UTF-8 text file as a prompt, its line ends as they are.",
    ),
    click.option(
        "--token-ids",
        "token_files",
        multiple=True,
        type=click.Path(path_type=Path),
        help="A JSON file: a list of token ids, taken as they are, or a list of such lists.",
    ),
    click.option(
        "--synthetic",
        multiple=True,
        type=TokenCount(),
        metavar="N",
        help="A prompt of N pseudo-random tokens, such as 8192, 128K or 1M.",
    ),
    click.option(
        "--parse-control-tokens",
        is_flag=True,
        help="Read control tokens in --prompt and --prompt-file as such, for prompts that a chat "
        "template has rendered already. Without it they are letters.",
    ),
)

# What a file of token ids takes beside its ids: ten digits and an indented line for each, and a
# batch of several sequences.
_ID_BYTES, _IDS_FILE_BYTES = 64, 64 << 20


@dataclass(frozen=True)
class Prompts:
    """The prompt options as they were given."""

    texts: tuple[str, ...]
    files: tuple[Path, ...]
    token_files: tuple[Path, ...]
    synthetic: tuple[int, ...]
    chat: bool
    parse: bool = False

    def __bool__(self) -> bool:
        return bool(self.texts or self.files or self.token_files or self.synthetic)

    def encode(self, checkpoint: "Checkpoint", *, begin: bool) -> list[list[int]]:
        """Token ids of each prompt; `begin` says that a text starts a sequence and so takes the BOS
        that the model asks for.

        UserError in one line for a prompt that is empty, unreadable or not of the model's
        vocabulary.
        """
        from cptool.checkpoint.tokenizer.input_checks import check_ids

        context = checkpoint.config.max_position_embeddings
        texts = [(f"--prompt {number}", text) for number, text in enumerate(self.texts, 1)]
        texts += [(str(path), _read_text(path, context)) for path in self.files]
        if self.parse and not texts:
            raise UserError(
                "--parse-control-tokens: it is about text; give --prompt or --prompt-file, or "
                "leave it out"
            )
        if self.parse and self.chat:
            raise UserError(
                "--parse-control-tokens: with --chat the model's template writes the control "
                "tokens; leave one of the two out"
            )
        sequences = []
        if texts:
            tokenizer = checkpoint.tokenizer()
            if tokenizer is None:
                raise UserError(
                    f"{checkpoint.path} has no tokenizer, so a text prompt cannot be read; give "
                    "--token-ids"
                )
            for name, text in texts:
                if not text:
                    raise UserError(f"{name}: the prompt is empty; give at least one character")
                sequences.append((name, self._enter(tokenizer, name, text, begin)))
        elif self.chat:
            raise UserError(
                "--chat: it needs a text prompt; give --prompt or --prompt-file, or leave it out"
            )
        sequences += [
            entry for path in self.token_files for entry in _read_token_ids(path, context)
        ]
        check_context(list(self.synthetic), [0] * len(self.synthetic), 0, checkpoint.config)
        sequences += [
            (f"--synthetic {n}", _synthetic(n, checkpoint.config.vocab_size))
            for n in self.synthetic
        ]
        for name, tokens in sequences:
            if not tokens:
                raise UserError(f"{name}: the prompt is empty; give at least one token")
            with _named(name):
                check_ids(tokens, checkpoint.config.vocab_size)
        return [tokens for _, tokens in sequences]

    def _enter(self, tokenizer: "Tokenizer", name: str, text: str, begin: bool) -> list[int]:
        """Token ids of one text; says so where it spells control tokens, which are letters."""
        with _named(name):
            if self.chat:
                tokens = tokenizer.chat([{"role": "user", "content": text}])
                if tokenizer.leaves_out("user"):
                    draw.say(f"{name}: the model's chat template leaves the text out")
                return tokens
            tokens = tokenizer.encode(text, bos=begin, parse=self.parse)
        if not self.parse and (spelled := tokenizer.spelled(text)):
            more = f" and {len(spelled) - 1} more" if len(spelled) > 1 else ""
            draw.say(
                f"{name}: {spelled[0]}{more} in it read as letters, not as control tokens; --chat "
                "renders a message, --parse-control-tokens reads a prompt that was rendered"
            )
        return tokens


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts the name of a prompt before what is refused about it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def check_context(new: list[int], cached: list[int], more: int, config: "LlamaConfig") -> None:
    """Refuses sequences that would outgrow the positions the model was made for."""
    for b, (added, held) in enumerate(zip(new, cached, strict=True), 1):
        if added + held + more > config.max_position_embeddings:
            parts = (
                [f"{held} cached"] * bool(held)
                + [f"{added} new"]
                + [f"{more} to come"] * bool(more)
            )
            raise UserError(
                f"sequence {b} has {added + held + more} tokens ({', '.join(parts)}), the model's "
                "context is "
                f"{config.max_position_embeddings}; shorten it, or give --context-length if the "
                "model was made for more"
            )


def _read_text(path: Path, context: int) -> str:
    """The text as it stands: no line end is changed; a byte order mark is none of it."""
    # No vocabulary has tokens of so many bytes that a text of this size is of `context` tokens.
    data = _read_regular(path, "a text file", (context << 10) + (1 << 20), context)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from None


def _read_regular(path: Path, kind: str, limit: int, context: int) -> bytes:
    """The bytes of a file of at most `limit`; others are refused before they are read."""
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


def _read_token_ids(path: Path, context: int) -> list[tuple[str, list[int]]]:
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


def _synthetic(count: int, vocab_size: int) -> list[int]:
    import random

    generator = random.Random(count)
    return [generator.randrange(vocab_size) for _ in range(count)]
