"""Reading the user's lines in `cptool chat`, from a terminal or a pipe."""

import codecs
import itertools
import sys
from collections.abc import Iterator

import click

from cptool.cli import draw
from cptool.distributed import signals
from cptool.errors import UserError

_LINE_BYTES = 1 << 28


def questions(*, paragraphs: bool) -> Iterator[str]:
    """Yield the questions and commands of standard input, after a prompt if it is a terminal.

    Each is a line, or with `paragraphs` the lines up to a blank one. A text that was pasted at a
    terminal is one, whatever its lines. Raises UserError for `paragraphs` at a terminal.
    """
    if not sys.stdin.isatty():
        return _paragraphs(_piped()) if paragraphs else _piped()
    if paragraphs:
        raise UserError(
            "--paragraphs: standard input is a terminal, where a text that is pasted is one "
            "question; leave it out"
        )
    return _typed()


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    """Yield lines joined up to the next blank one."""
    for blank, group in itertools.groupby(lines, lambda line: not line.strip()):
        if not blank:
            yield "\n".join(group)


def _piped() -> Iterator[str]:
    """Yield lines as UTF-8, whatever encoding the environment names.

    Other bytes become lone surrogates. A byte order mark in front does not belong to the text.
    """
    mark = codecs.BOM_UTF8
    while line := sys.stdin.buffer.readline(_LINE_BYTES):
        if len(line) == _LINE_BYTES and not line.endswith(b"\n"):
            draw.say(
                f"a line of more than {_LINE_BYTES:,} bytes was left out; ask in a shorter one",
                always=True,
            )
            while (line := sys.stdin.buffer.readline(_LINE_BYTES)) and not line.endswith(b"\n"):
                pass
            continue
        line, mark = line.removeprefix(mark), b""
        yield line.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")


def _typed() -> Iterator[str]:
    """Yield lines with editing and history. Ctrl-C discards a line and never ends the program."""
    import readline  # input() uses it once it is imported

    # Python turns it off. A pasted text is then one line with line ends in it, as is its history.
    readline.parse_and_bind("set enable-bracketed-paste on")
    while (line := _typed_line()) is not None:
        yield line.strip("\n") if "\n" in line else line


def _typed_line() -> str | None:
    """Return the next line, None at Ctrl-D."""
    with signals.caught() as interrupts:
        while True:
            try:
                return interrupts.wait(lambda: input("> "))
            except EOFError:
                click.echo()
                return None
            except KeyboardInterrupt:
                draw.say("\n(Ctrl-D or /exit to end)")
