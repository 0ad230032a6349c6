"""The options for the text behind a gap, which an answer fills (`Tokenizer.infill`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from cptool.cli.options.prompt_files import read_text
from cptool.errors import UserError

if TYPE_CHECKING:
    from cptool.model.config import LlamaConfig

GAP_OPTIONS = (
    click.option(
        "--suffix",
        metavar="TEXT",
        help="Fill the gap between each prompt and this text, with models made for that, such as "
        "Code Llama 7B and Qwen 2.5 Coder.",
    ),
    click.option(
        "--suffix-file",
        type=click.Path(),
        metavar="FILE",
        help="The same with the text of a UTF-8 file, its line ends as they are.",
    ),
)


def check_gap(suffix: str | None, file: str | None, others: Mapping[str, bool]) -> None:
    """Raise UserError for a text behind a gap beside options that do not go with one.

    others: such options, and whether they are given.
    """
    if suffix is None and file is None:
        return
    name = "--suffix" if file is None else "--suffix-file"
    if suffix is not None and file is not None:
        raise UserError("--suffix and --suffix-file are both given; leave one of them out")
    if stray := next((option for option, given in others.items() if given), None):
        raise UserError(f"{name}: it goes with prompts that are plain texts; leave out {stray}")


def read_behind(suffix: str | None, file: str | None, config: LlamaConfig) -> str | None:
    """Return the text behind the gap, None if there is none."""
    return suffix if file is None else read_text(file, config.max_position_embeddings)
