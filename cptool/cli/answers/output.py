"""The options that say how answers are written, and what writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import click

from cptool.cli.options.common import json_option
from cptool.cli.options.records import as_object

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.engine.answers.records import Emit
    from cptool.engine.turn import Report, Turn


class Writer(Protocol):
    """Writes the answers of a turn to standard output, from their first token to the report."""

    @property
    def emit(self) -> Emit | None:
        """What takes each token as it is known (`cptool.cli.launch.run_turn`); None for a writer
        that waits for the report, so that the progress bar stays until then.
        """

    def finish(self, report: Report) -> None:
        """Write what is left. Raises RunError if standard output could not be written."""


@dataclass(frozen=True, kw_only=True)
class OutputRequest:
    """How the user wants answers: as text, as one JSON object, or as lines of JSON; `echo`: after
    the prompt.
    """

    as_json: bool = False
    json_lines: bool = False
    echo: bool = False

    @property
    def for_people(self) -> bool:
        """Whether answers are text, with figures after them."""
        return not (self.as_json or self.json_lines)

    def check(self) -> None:
        """Raise UsageError for options that exclude each other."""
        if self.as_json and self.json_lines:
            raise click.UsageError("--json and --jsonl exclude each other; leave one out")

    def writer(
        self,
        turn: Turn,
        tokenizer: Tokenizer | None,
        prompts: Sequence[Sequence[int]],
        after: Sequence[Sequence[int]],
    ) -> Writer:
        """Return what writes the answers of `turn`.

        prompts: the token ids that --echo shows, control tokens too.
        after: the tokens whose text each answer goes on with.
        """
        from cptool.cli.answers import writers

        echo = [writers.shown(ids, tokenizer) for ids in prompts] if self.echo else []
        if self.as_json:
            return writers.OneObject(turn, tokenizer, echo, after)
        if self.json_lines:
            return writers.JsonLines(turn, tokenizer, echo, after)
        if len(after) == 1 and tokenizer is not None:
            return writers.OneText(turn, tokenizer, "".join(echo), after[0])
        return writers.Texts(turn, tokenizer, echo, after)


output_options = as_object(
    "output",
    OutputRequest,
    [
        click.option("--echo", is_flag=True, help="Write the prompt before its answer."),
        json_option,
        click.option(
            "--jsonl",
            "json_lines",
            is_flag=True,
            help="Write one JSON object per line: each token as it comes, then the result.",
        ),
    ],
)
