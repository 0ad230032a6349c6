"""Text broken into lines between words, a number and its unit on one line."""

from __future__ import annotations

import re
import textwrap

_GLUE = "\N{NO-BREAK SPACE}"

_IN_A_QUANTITY = re.compile(
    r"(?<=\d) (?=(?:s|ms|us|ns|min|h|d|[kKMGTP]?B(?:/s)?|[kKMGTP]?FLOP/s|tokens?(?:/s)?)(?!\w))"
    r"|(?<=\d d) (?=\d)|(?<=\d h) (?=\d)|(?<=\d min) (?=\d)"
)

_QUOTED = re.compile(r"'[^']*'")


def wrapped(text: str, width: int, *, break_long_words: bool = False) -> list[str]:
    """Return the lines of a text of one line that `width` columns take; one line at least.

    A word longer than that stays whole, unless `break_long_words`.
    """
    if not text.isascii() and break_long_words:
        return _wrapped_cells(text, width)
    lines = textwrap.wrap(
        _IN_A_QUANTITY.sub(_GLUE, text),
        width,
        break_long_words=break_long_words,
        break_on_hyphens=False,
    )
    return [line.replace(_GLUE, " ") for line in lines] or [""]


def _wrapped_cells(text: str, width: int) -> list[str]:
    """Return the lines of a text that may have characters of two columns, or of none."""
    from rich.console import Console
    from rich.text import Text

    lines = Text(text).wrap(Console(width=width), width, overflow="fold")
    return [line.plain.rstrip() for line in lines] or [""]


def continued(command: str, width: int) -> list[str]:
    """Return a shell command in lines of at most `width` columns where its words allow it, each but
    the last with the backslash that continues it.
    """
    lines = textwrap.wrap(
        _QUOTED.sub(lambda word: word[0].replace(" ", _GLUE), command),
        width - 2,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    lines = [line.replace(_GLUE, " ") for line in lines]
    return [*(f"{line} \\" for line in lines[:-1]), *lines[-1:]]
