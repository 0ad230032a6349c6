"""The options that give prompts, and the token ids that they stand for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cptool.cli.counts import TokenCount
from cptool.cli.options import stack
from cptool.errors import UserError

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
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
)


@dataclass(frozen=True)
class Prompts:
    """The prompt options as they were given."""

    texts: tuple[str, ...]
    files: tuple[Path, ...]
    token_files: tuple[Path, ...]
    synthetic: tuple[int, ...]
    chat: bool

    def __bool__(self) -> bool:
        return bool(self.texts or self.files or self.token_files or self.synthetic)

    def encode(self, checkpoint: "Checkpoint", *, begin: bool) -> list[list[int]]:
        """Token ids of each prompt; `begin` says that a text starts a sequence and so takes the BOS
        that the model asks for.

        UserError in one line for a prompt that is empty, unreadable or not of the model's
        vocabulary.
        """
        texts = [(f"--prompt {number}", text) for number, text in enumerate(self.texts, 1)]
        texts += [(str(path), _read_text(path)) for path in self.files]
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
                if any("\ud800" <= character <= "\udfff" for character in text):
                    raise UserError(f"{name}: it is not UTF-8 text; convert it first")
                if self.chat:
                    sequences.append((name, tokenizer.chat([{"role": "user", "content": text}])))
                else:
                    sequences.append((name, tokenizer.encode(text, bos=begin)))
        elif self.chat:
            raise UserError(
                "--chat: it needs a text prompt; give --prompt or --prompt-file, or leave it out"
            )
        sequences += [entry for path in self.token_files for entry in _read_token_ids(path)]
        check_context(list(self.synthetic), [0] * len(self.synthetic), 0, checkpoint.config)
        sequences += [
            (f"--synthetic {n}", _synthetic(n, checkpoint.config.vocab_size))
            for n in self.synthetic
        ]
        for name, tokens in sequences:
            _check_tokens(name, tokens, checkpoint.config)
        return [tokens for _, tokens in sequences]


def check_context(new: list[int], cached: list[int], more: int, config: "LlamaConfig") -> None:
    """Refuses sequences that would outgrow the positions the model was made for."""
    for b, (added, held) in enumerate(zip(new, cached), 1):
        if added + held + more > config.max_position_embeddings:
            parts = (
                [f"{held} cached"] * bool(held)
                + [f"{added} new"]
                + [f"{more} to come"] * bool(more)
            )
            raise UserError(
                f"sequence {b} has {added + held + more} tokens ({', '.join(parts)}), the model's "
                "context is "
                f"{config.max_position_embeddings}; shorten it"
            )


def _read_text(path: Path) -> str:
    """The text as it stands: no line end is changed; a byte order mark is none of it."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a text file") from None


def _read_token_ids(path: Path) -> list[tuple[str, list[int]]]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); name a JSON file of token ids"
        ) from None
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
    return list(zip(names, rows))


def _check_tokens(name: str, tokens: list[int], config: "LlamaConfig") -> None:
    if not tokens:
        raise UserError(f"{name}: the prompt is empty; give at least one token")
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise UserError(
            f"{name}: token id {wrong} is not in the model's vocabulary, 0 to "
            f"{config.vocab_size - 1}"
        )


def _synthetic(count: int, vocab_size: int) -> list[int]:
    import random

    generator = random.Random(count)
    return [generator.randrange(vocab_size) for _ in range(count)]
