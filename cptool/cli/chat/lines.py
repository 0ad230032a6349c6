"""Reading the user's lines in `cptool chat`, from a terminal or a pipe."""

import codecs
import sys
from collections.abc import Iterator

import click

from cptool.cli import draw
from cptool.distributed import signals

_LINE_BYTES = 1 << 28


def lines() -> Iterator[str]:
    """Yield the lines of standard input, after a prompt if it is a terminal."""
    return _typed() if sys.stdin.isatty() else _piped()


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
    """Yield lines with editing and history.

    Ctrl-C discards a line, a second one in a row ends the program.
    """
    import readline  # noqa: F401  input() uses it once it is imported

    interrupted = False
    while True:
        try:
            with signals.caught():
                line = input("> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            draw.say("\n(Ctrl-C again, Ctrl-D or /exit to end)")
            continue
        interrupted = False
        yield line
