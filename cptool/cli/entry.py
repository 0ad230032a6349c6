"""The entry point: from here on a Ctrl-C is one line and exit code 130.

It imports almost nothing, so that this holds from the start.
"""

import _signal  # what `signal` is made of, without the enumerations that take it milliseconds
import os


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
    except SystemExit as end:
        _leave_threads(end.code)
        raise


def _leave_threads(code: object) -> None:
    """End at once if a thread would disturb the interpreter's end: a rank in this process would go
    on computing meanwhile, and the hub's library would receive more of a file.
    """
    import sys
    import threading

    if any(thread.name in ("cptool-ranks", "cptool-hub") for thread in threading.enumerate()):
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _leave(number: int, frame: object) -> None:
    """End at once: nothing has begun that would have to be cleaned up."""
    newline = b"\n" if os.isatty(2) else b""  # after the ^C of a terminal
    try:
        os.write(2, newline + b"cptool: interrupted\n")
    finally:
        os._exit(130)


if __name__ == "__main__":
    main()
