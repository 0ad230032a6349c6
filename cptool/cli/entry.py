"""Where the command begins: from here on a Ctrl-C is one line and exit code 130.

Imports next to nothing, so that little happens before that holds.
"""

import _signal  # what `signal` is made of, without the enumerations that take it milliseconds
import os
import sys


def main() -> None:
    """Run the command line of this process."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _leave)
    from cptool.cli import streams

    streams.prepare()
    from cptool.cli.main import main
    from cptool.distributed.signals import guard

    try:
        guard(_leave)
        main()
    except KeyboardInterrupt:  # before or after what `main` itself catches
        _leave(_signal.SIGINT, None)


def _leave(number: int, frame) -> None:
    """Nothing is begun that would have to be put in order."""
    newline = b"\n" if os.isatty(2) else b""  # after the ^C of a terminal
    try:
        os.write(2, newline + b"cptool: interrupted\n")
    finally:
        os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
