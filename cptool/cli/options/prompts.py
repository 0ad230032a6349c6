"""The options that give prompts, and the token ids that they stand for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cptool.cli import draw
from cptool.cli.options.prompt_files import read_text, read_token_ids
from cptool.cli.options.records import as_object
from cptool.cli.options.types import TokenCount
from cptool.errors import UserError

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.model.config import LlamaConfig

_PROMPTS = (
    click.option(
        "--prompt",
        "texts",
        multiple=True,
        metavar="TEXT",
        help="A prompt.",
    ),
    click.option(
        "--prompt-file",
        "files",
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
        "parse",
        is_flag=True,
        help="Read control tokens in --prompt and --prompt-file as such, for prompts that a chat "
        "template has rendered already. Without it they are letters.",
    ),
)
_CHAT = click.option(
    "--chat",
    is_flag=True,
    help="Put each text prompt into the model's chat template, as a user's message.",
)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompt options as they were given.

    chat: whether each text goes into the model's chat template, as a user's message.
    parse: whether control tokens in a text are read as such.
    """

    texts: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    token_files: tuple[Path, ...] = ()
    synthetic: tuple[int, ...] = ()
    chat: bool = False
    parse: bool = False

    def __bool__(self) -> bool:
        return bool(self.texts or self.files or self.token_files or self.synthetic)

    def encode(self, checkpoint: "Checkpoint", *, begin: bool) -> list[list[int]]:
        """Return the token ids of each prompt.

        `begin` says whether a text starts a sequence and so takes the BOS that the model asks for.
        Raises UserError for a prompt that is empty, unreadable or not of the model's vocabulary.
        """
        from cptool.checkpoint.tokenizer.input_checks import check_ids

        config = checkpoint.config
        context = config.max_position_embeddings
        sequences = self._encode_texts(checkpoint, begin)
        sequences += [entry for path in self.token_files for entry in read_token_ids(path, context)]
        check_context(list(self.synthetic), [0] * len(self.synthetic), 0, config)
        sequences += [
            (f"--synthetic {n}", _synthetic(n, config.vocab_size)) for n in self.synthetic
        ]
        for name, tokens in sequences:
            if not tokens:
                raise UserError(f"{name}: the prompt is empty; give at least one token")
            with _named(name):
                check_ids(tokens, config.vocab_size)
        return [tokens for _, tokens in sequences]

    def _encode_texts(self, checkpoint: "Checkpoint", begin: bool) -> list[tuple[str, list[int]]]:
        """Return names and token ids of the prompts that are text."""
        context = checkpoint.config.max_position_embeddings
        texts = [(f"--prompt {number}", text) for number, text in enumerate(self.texts, 1)]
        texts += [(str(path), read_text(path, context)) for path in self.files]
        self._check_text_options(bool(texts))
        if not texts:
            return []
        tokenizer = checkpoint.tokenizer()
        if tokenizer is None:
            raise UserError(
                f"{checkpoint.path} has no tokenizer, so a text prompt cannot be read; give "
                "--token-ids"
            )
        sequences = []
        for name, text in texts:
            if not text:
                raise UserError(f"{name}: the prompt is empty; give at least one character")
            sequences.append((name, self._enter(tokenizer, name, text, begin)))
        return sequences

    def _check_text_options(self, has_text: bool) -> None:
        """Raise UserError for options about text that are given without any, or exclude each
        other.
        """
        if self.parse and not has_text:
            raise UserError(
                "--parse-control-tokens: it applies to text; give --prompt or --prompt-file, or "
                "leave it out"
            )
        if self.parse and self.chat:
            raise UserError(
                "--parse-control-tokens: with --chat the model's template writes the control "
                "tokens; leave one of the two out"
            )
        if self.chat and not has_text:
            raise UserError(
                "--chat: it needs a text prompt; give --prompt or --prompt-file, or leave it out"
            )

    def _enter(self, tokenizer: "Tokenizer", name: str, text: str, begin: bool) -> list[int]:
        """Return the token ids of one text; say so if it spells control tokens (letters)."""
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


prompt_options = as_object("asked", Prompts, _PROMPTS)
chat_prompt_options = as_object("asked", Prompts, (*_PROMPTS, _CHAT))


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the prompt in a UserError that the body raises about it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def check_context(new: list[int], cached: list[int], more: int, config: "LlamaConfig") -> None:
    """Raise UserError for sequences longer than the context of the model."""
    for b, (added, held) in enumerate(zip(new, cached, strict=True), 1):
        if added + held + more > config.max_position_embeddings:
            parts = (
                [f"{held} cached"] * bool(held)
                + [f"{added} new"]
                + [f"{more} to come"] * bool(more)
            )
            raise UserError(
                f"sequence {b} has {added + held + more} tokens ({', '.join(parts)}), the model's "
                f"context is {config.max_position_embeddings}; shorten it, or give "
                "--context-length if the model was made for more"
            )


def _synthetic(count: int, vocab_size: int) -> list[int]:
    import random

    generator = random.Random(count)
    return [generator.randrange(vocab_size) for _ in range(count)]
