"""The options that give prompts, and the token ids that they stand for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from cptool.cli import draw
from cptool.cli.options.gap import GAP_OPTIONS, check_gap, read_behind
from cptool.cli.options.images import read_images, with_images
from cptool.cli.options.ordered import ordered
from cptool.cli.options.prompt_files import (
    STANDARD_INPUT,
    join_parts,
    read_stdin,
    read_text,
    read_token_ids,
)
from cptool.cli.options.records import as_object
from cptool.cli.options.types import TokenCount
from cptool.errors import UserError
from cptool.model.context import check_context

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.model.config import LlamaConfig

_GIVEN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--prompt", {"metavar": "TEXT", "help": "A prompt; - reads it from standard input."}),
    (
        "--prompt-file",
        {
            "type": click.Path(),
            "metavar": "FILE",
            "help": "A UTF-8 text file as a prompt, its line ends as they are; - is standard "
            "input.",
        },
    ),
    (
        "--file",
        {
            "type": click.Path(),
            "metavar": "FILE",
            "help": "A text file that the next --prompt or --prompt-file begins with, a blank line "
            "after it, such as a document before a question.",
        },
    ),
    (
        "--image-tokens",
        {
            "type": click.Path(),
            "metavar": "FILE",
            "help": "A JSON file of the token ids of an image, or a list of such lists, before the "
            "text of the next --prompt or --prompt-file, for models whose vocabulary has images.",
        },
    ),
    (
        "--token-ids",
        {
            "type": click.Path(),
            "metavar": "FILE",
            "help": "A JSON file: a list of token ids, taken as they are, or a list of such lists.",
        },
    ),
    (
        "--synthetic",
        {
            "type": TokenCount(),
            "metavar": "N",
            "help": "A prompt of N pseudo-random tokens, such as 8192, 128K or 1M.",
        },
    ),
)
_PARSE = click.option(
    "--parse-control-tokens",
    "parse",
    is_flag=True,
    help="Read control tokens in texts as such, for prompts that a chat template has rendered "
    "already. Without it they are letters.",
)
_CHAT = click.option(
    "--chat",
    is_flag=True,
    help="Put each text prompt into the model's chat template, as a user's message.",
)
_SYSTEM = click.option(
    "--system", metavar="TEXT", help="With --chat, a system message before each prompt."
)


_TEXTS = ("--prompt", "--prompt-file", "--file")
_FILES = ("--prompt-file", "--file", "--token-ids", "--image-tokens")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt, read and encoded.

    name: as the command line gives it, for errors. text: what it says; None for token ids.
    messages: what the chat template was given, if it was.
    """

    name: str
    tokens: list[int]
    text: str | None = None
    messages: list[dict[str, str]] | None = None


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompt options as they were given.

    given: options and their values, in the command line's order.
    chat: whether each text goes into the model's chat template, as a user's message after `system`.
    parse: whether control tokens in a text are read as such.
    suffix, suffix_file: the text behind a gap that each answer fills, or its file.
    """

    given: tuple[tuple[str, Any], ...] = ()
    chat: bool = False
    system: str | None = None
    parse: bool = False
    suffix: str | None = None
    suffix_file: str | None = None

    def __bool__(self) -> bool:
        return bool(self.given)

    def encode(self, checkpoint: "Checkpoint", *, begin: bool) -> list[list[int]]:
        """Return the token ids of each prompt; see `read`."""
        return [prompt.tokens for prompt in self.read(checkpoint, begin=begin)]

    def read(self, checkpoint: "Checkpoint", *, begin: bool) -> list[Prompt]:
        """Return each prompt, in the order of the command line. Standard input is read once.

        `begin` says whether a text starts a sequence and so takes the BOS that the model asks for.
        Raises UserError for a prompt that is empty, unreadable or not of the model's vocabulary.
        """
        from cptool.checkpoint.tokenizer.input_checks import check_ids

        self._check_options()
        prompts: list[Prompt] = []
        parts: list[str] = []  # of the next text prompt
        images: list[int] = []
        for name, option, value in self._named_values():
            if option == "--image-tokens":
                images += read_images(value, checkpoint)
                continue
            if option in _TEXTS:
                parts.append(self._text(name, option, value, checkpoint))
                if option != "--file":
                    prompts.append(self._encoded(name, parts, images, checkpoint, begin=begin))
                    parts, images = [], []
                continue
            if parts or images:
                raise UserError(
                    f"{option} after {'--file' if parts else '--image-tokens'}: token ids do not "
                    "join a text; give the --prompt of the file first"
                )
            rows = _tokens(option, value, checkpoint.config, before=len(prompts))
            prompts += [Prompt(name=name, tokens=tokens) for name, tokens in rows]
        if parts:
            prompts.append(self._encoded(name, parts, images, checkpoint, begin=begin))
        elif images:
            raise UserError("--image-tokens: no text follows the image; give a --prompt after it")
        tokenizer = checkpoint.tokenizer()
        if self.system is not None and tokenizer is not None and tokenizer.leaves_out("system"):
            draw.say("--system: the model's chat template leaves the text out", always=True)
        for prompt in prompts:
            if not prompt.tokens:
                raise UserError(f"{prompt.name}: the prompt is empty; give at least one token")
            with _named(prompt.name):
                check_ids(prompt.tokens, checkpoint.config.vocab_size)
        return prompts

    def _named_values(self) -> Iterator[tuple[str, str, Any]]:
        """Yield what to call each value in errors, its option, and the value."""
        count = 0
        for option, value in self.given:
            count += option == "--prompt"
            if option in _TEXTS and value == STANDARD_INPUT:
                yield "standard input", option, value
            elif option == "--prompt":
                yield f"--prompt {count}", option, value
            else:
                yield str(value) if option in _FILES else f"{option} {value}", option, value

    def _text(self, name: str, option: str, value: str, checkpoint: "Checkpoint") -> str:
        """Return a text as it is given, or as its file or standard input holds it."""
        context = checkpoint.config.max_position_embeddings
        if value == STANDARD_INPUT:
            text = read_stdin(context)
        else:
            text = value if option == "--prompt" else read_text(value, context)
        if not text:
            raise UserError(f"{name}: the prompt is empty; give at least one character")
        return text

    def _check_options(self) -> None:
        """Raise UserError for options about text that are given without any, or exclude each
        other.
        """
        has_text = any(option in _TEXTS for option, _ in self.given)
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
        if self.chat and any(option == "--image-tokens" for option, _ in self.given):
            raise UserError(
                "--image-tokens: the messages of a chat are text; leave out one of it and --chat"
            )
        if self.system is not None and not self.chat:
            raise UserError("--system: it is a message of the chat template; add --chat")
        others = {"--chat": self.chat, "--parse-control-tokens": self.parse}
        others |= {option: option not in _TEXTS for option, _ in self.given}
        check_gap(self.suffix, self.suffix_file, others)
        dashes = [o for o, value in self.given if o in _TEXTS and value == STANDARD_INPUT]
        if len(dashes) > 1:
            raise UserError(
                f"{dashes[1]} -: standard input is read once, by {dashes[0]} -; name a file"
            )

    def _encoded(
        self,
        name: str,
        parts: list[str],
        images: list[int],
        checkpoint: "Checkpoint",
        *,
        begin: bool,
    ) -> Prompt:
        """Return the prompt of one text, of these parts and with tokens of images before it; say so
        if it spells control tokens (letters).
        """
        text, tokenizer = join_parts(parts), checkpoint.tokenizer()
        if tokenizer is None:
            raise UserError(
                f"{checkpoint.path} has no tokenizer, so a text prompt cannot be read; give "
                "--token-ids"
            )
        with _named(name):
            if self.chat:
                messages = [] if self.system is None else [_message("system", self.system)]
                messages.append(_message("user", text))
                tokens = tokenizer.chat(messages)
                if tokenizer.leaves_out("user"):
                    draw.say(f"{name}: the model's chat template leaves the text out", always=True)
                return Prompt(name=name, tokens=tokens, text=text, messages=messages)
            behind = read_behind(self.suffix, self.suffix_file, checkpoint.config)
            if behind is not None:
                tokens = tokenizer.infill(text, behind, bos=begin)
            else:
                tokens = tokenizer.encode(text, bos=begin, parse=self.parse)
            tokens = with_images(images, tokens, tokenizer.bos_id)
        if not self.parse:
            _say_what_is_spelled(name, text, tokenizer)
            if behind is not None:
                given = "--suffix" if self.suffix_file is None else str(self.suffix_file)
                _say_what_is_spelled(given, behind, tokenizer)
        return Prompt(name=name, tokens=tokens, text=text)


prompt_options = as_object("asked", Prompts, (ordered("given", _GIVEN), _PARSE))
chat_prompt_options = as_object(
    "asked", Prompts, (ordered("given", _GIVEN), _PARSE, _CHAT, _SYSTEM)
)

completion_prompt_options = as_object(
    "asked", Prompts, (ordered("given", _GIVEN), _PARSE, _CHAT, _SYSTEM, *GAP_OPTIONS)
)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _say_what_is_spelled(name: str, text: str, tokenizer: "Tokenizer") -> None:
    """Say which control tokens a text spells, which are letters in it."""
    if spelled := tokenizer.spelled(text):
        more = f" and {len(spelled) - 1} more" if len(spelled) > 1 else ""
        draw.say(
            f"{name}: {spelled[0]}{more} in it read as letters, not as control tokens; --chat "
            "renders a message, --parse-control-tokens reads a prompt that was rendered",
            always=True,
        )


def _tokens(
    option: str, value: Any, config: "LlamaConfig", *, before: int
) -> list[tuple[str, list[int]]]:
    """Return names and token ids of the prompts of an option that gives no text.

    before: the number of prompts before them.
    """
    if option == "--token-ids":
        return read_token_ids(value, config.max_position_embeddings)
    zeros = [0] * before
    check_context([*zeros, value], [*zeros, 0], 0, config)
    return [(f"{option} {value}", _synthetic(value, config.vocab_size))]


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the prompt in a UserError that the body raises about it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _synthetic(count: int, vocab_size: int) -> list[int]:
    import random

    generator = random.Random(count)
    return [generator.randrange(vocab_size) for _ in range(count)]
