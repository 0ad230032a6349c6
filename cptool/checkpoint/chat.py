"""Chat templates: a model's Jinja program that turns messages into one text.

A template writes control tokens such as `<|im_start|>` as text, and so may a user, who must not be
able to begin a turn of his own. `Guard` tells the two apart: what looks like a control token in a
message is marked before rendering, and what is unmarked afterwards is the template's.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from cptool.checkpoint.base import first_line
from cptool.errors import UserError

Message = Mapping[str, Any]


def render(
    template: str,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    tokens: Mapping[str, str],
) -> str:
    """The text of a conversation, as transformers' `apply_chat_template` renders it.

    `tokens` are the variables that name special tokens: `bos_token`, `eos_token`. The template runs
    in a sandbox. Raises UserError where it is faulty or refuses the messages.
    """
    try:
        return _compile(template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **tokens,
        )
    except Exception as error:  # The template is its author's program: it may raise anything.
        raise UserError(
            f"the model's chat template refuses these messages ({first_line(error)}); check their "
            f"roles and order, or give a plain prompt"
        ) from None


class Guard:
    """Keeps control tokens in messages apart from those that a template writes.

    The marks are private and random, so that no message can hold one.
    """

    def __init__(self, control_tokens: Iterable[str]):
        # Digits alone: whatever filter a template applies to a message, no letter case is at stake.
        nonce = secrets.randbits(64)
        self._mark = f"\ufdd0{nonce}\ufdd1"
        longest_first = sorted(control_tokens, key=len, reverse=True)
        alternatives = "|".join(map(re.escape, longest_first)) or r"(?!)"
        # A lookahead finds overlapping occurrences too, each of which must be broken.
        self._start = re.compile(f"(?=(?:{alternatives}))")
        self._unmarked = re.compile(f"(?<!{self._mark})(?:{alternatives})")
        self.placeholders = {
            token: f"\ufdd2{nonce}-{index}\ufdd3" for index, token in enumerate(longest_first)
        }

    def mark(self, value: Any) -> Any:
        """A message, or any part of one, with a mark before each control token in its strings."""
        if isinstance(value, str):
            return self._start.sub(self._mark, value)
        if isinstance(value, Mapping):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def unmark(self, rendered: str) -> str:
        """The rendered text without marks, the template's own control tokens as placeholders."""
        text = self._unmarked.sub(lambda match: self.placeholders[match.group()], rendered)
        return text.replace(self._mark, "")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` blocks, which mark answers for training: here just their body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(value: Any, **settings: Any) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, **{"ensure_ascii": False, **settings})


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def default_template(value: Any) -> str | None:
    """The template out of a `chat_template` setting: a text, or a list of named ones."""
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict)]
        value = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    return value if isinstance(value, str) else None
