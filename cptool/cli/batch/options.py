"""The options of a file of prompts that becomes a file of answers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from cptool.cli import verbosity
from cptool.cli.options.prompt_files import STANDARD_INPUT
from cptool.cli.options.records import as_object

if TYPE_CHECKING:
    from cptool.cli.answers.output import OutputRequest
    from cptool.cli.batch.lines import Line
    from cptool.cli.options.prompts import Prompts

STANDARD_OUTPUT = "-"
"""In place of a file: write to standard output."""

DEFAULT_SIZE, DEFAULT_TOKENS_TOGETHER = 16, 16384
"""Without --batch-size, so many prompts at a time, of so many tokens together."""


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """A file of prompts, the file for their answers, and how many to answer at a time."""

    source: str | None = None
    destination: str = STANDARD_OUTPUT
    size: int | None = None

    def __bool__(self) -> bool:
        return self.source is not None

    def check(self, asked: Prompts, output: OutputRequest, others: Mapping[str, object]) -> None:
        """Raise UsageError for options that do not go together.

        others: options that do not go with a file of prompts, and their values.
        """
        from cptool.distributed.environment import launched_size

        if not self:
            if given := self._stray():
                raise click.UsageError(f"{given} goes with --batch-file; add it, or leave this out")
            return
        others = {
            **{option: True for option, _ in asked.given[:1]},
            "--suffix": asked.suffix is not None,
            "--suffix-file": asked.suffix_file is not None,
            "--echo": output.echo,
            "--jsonl": output.json_lines,
            "--progress json": verbosity.writes_progress_lines(),
            **others,
        }
        for option, value in others.items():
            if value:
                raise click.UsageError(f"{option} does not go with --batch-file; leave it out")
        if launched_size() is not None:
            raise click.UsageError(
                "--batch-file starts its own ranks; run it without a launcher, with --cp and --tp"
            )
        if output.as_json and self.destination == STANDARD_OUTPUT:
            raise click.UsageError(
                "--json prints a summary of the run where the answers go; add --output FILE"
            )
        if (
            self.source != STANDARD_INPUT
            and self.destination != STANDARD_OUTPUT
            and os.path.realpath(str(self.source)) == os.path.realpath(self.destination)
        ):
            raise click.UsageError("--output is the --batch-file itself; name another file")

    def _stray(self) -> str | None:
        """Return an option that was given, and is for a file of prompts alone."""
        if self.destination != STANDARD_OUTPUT:
            return "--output"
        return "--batch-size" if self.size is not None else None

    def batches(self, lines: Sequence[Line]) -> Iterator[Sequence[Line]]:
        """Yield the lines that are answered together, in order.

        All answers of a batch end with the same tokens, so that no answer depends on its batch.
        """
        begin = tokens = 0
        for at, line in enumerate(lines):
            full = at - begin == (self.size or DEFAULT_SIZE)
            if self.size is None:
                full |= tokens + len(line.tokens) > DEFAULT_TOKENS_TOGETHER
            if at > begin and (full or line.ends != lines[begin].ends):
                yield lines[begin:at]
                begin, tokens = at, 0
            tokens += len(line.tokens)
        if lines:
            yield lines[begin:]


batch_options = as_object(
    "batch",
    BatchRequest,
    [
        click.option(
            "--batch-file",
            "source",
            type=click.Path(),
            metavar="FILE",
            help='Answer every line of this file: {"prompt": TEXT}, {"messages": [...]} or '
            '{"token_ids": [...]}, with "id", "max_tokens" and "system" if wanted; - is '
            "standard input.",
        ),
        click.option(
            "--output",
            "destination",
            type=click.Path(),
            default=STANDARD_OUTPUT,
            metavar="FILE",
            help="With --batch-file, append a line of JSON per answer here, in order; the same "
            "command goes on where it was interrupted.  [default: -, standard output]",
        ),
        click.option(
            "--batch-size",
            "size",
            type=click.IntRange(min=1),
            metavar="B",
            help="With --batch-file, answer B prompts at a time; no answer depends on it.  "
            f"[default: {DEFAULT_SIZE}, or fewer that have {DEFAULT_TOKENS_TOGETHER:,} tokens "
            "together]",
        ),
    ],
)
