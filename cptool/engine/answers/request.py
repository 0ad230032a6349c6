"""Where a caller wants answers to end, and what is reported of their tokens. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cptool.engine.drafts.names import checked
from cptool.errors import OptionError, UserError

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint

MOST_LOGPROBS = 20
"""Likeliest tokens that are reported at most in each place."""


@dataclass(frozen=True, kw_only=True)
class AnswerRequest:
    """The options `stop`, `logprobs`, `prompt_logprobs` and `draft`.

    stop: texts that end an answer. One that is the spelling of a control token means that token.
    logprobs, prompt_logprobs: report the log-probability of each token of the answers and of the
        prompts, and this many of the likeliest tokens in its place; None for no report.
    draft: where tokens are drafted from (`cptool.engine.drafts.names`).
    """

    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    draft: str = "off"

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the fields of a `Turn` that say so.

        Raises OptionError for a value that cannot be, and UserError for stop texts without a
        tokenizer.
        """
        most = min(MOST_LOGPROBS, checkpoint.config.vocab_size)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 <= value <= most):
                rule = f"it must be a whole number from 0 to {most}"
                raise OptionError(name, value, rule, "0 reports the tokens alone")
        scores = {"logprobs": self.logprobs, "prompt_logprobs": self.prompt_logprobs}
        return {**self.in_chat(checkpoint), **scores}

    def in_chat(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return those that a conversation takes. Raises as `fields`."""
        return {**self.stops(checkpoint), "draft": checked(self.draft, checkpoint)}

    def stops(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the fields of `AnswerOptions` that say where answers end. Raises as `fields`."""
        if not self.stop:
            return {}
        tokenizer = checkpoint.tokenizer()
        if tokenizer is None:
            raise UserError(
                f"`stop` needs a tokenizer, and {checkpoint.path} has none; leave it out"
            )
        texts, tokens = [], []
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise OptionError("stop", repr(text), "it must be a text of at least one character")
            token = tokenizer.control_token(text)
            if token is not None:
                tokens.append(token)
            elif control := tokenizer.spelled(text):
                raise OptionError(
                    "stop",
                    repr(text),
                    f"no text of an answer has the control token {control[0]}",
                    "give that token alone, or the text without it",
                )
            else:
                texts.append(text)
        return {"stop_texts": tuple(texts), "stop_tokens": tuple(tokens)}
