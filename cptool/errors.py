"""Errors that are reported in one line, and the line for any other exception."""

from __future__ import annotations

import errno
import os
import re
import traceback
from pathlib import Path


class UserError(ValueError):
    """A mistake in the user's input: one line with the value, the rule and the remedy.

    The command line prints it and exits with code 2. Nothing was changed.
    """


class OptionError(UserError):
    """A value that an option, or the argument of the same name, does not take.

    Its one line names the option in backquotes, as every message of the library does: `top_p`,
    which the command line shows as --top-p (`as_options`).
    """

    def __init__(self, name: str, value: object, rule: str, remedy: str = "") -> None:
        """name: of the argument in Python. rule: what its values are, or why this one is refused.
        remedy: what to do instead, where the rule does not say it.
        """
        super().__init__(name, value, rule, remedy)
        self.name, self.value, self.rule, self.remedy = name, value, rule, remedy

    def __str__(self) -> str:
        return f"`{self.name}` {self.value}: {self.rule}" + (self.remedy and f"; {self.remedy}")


class Interrupted(Exception):
    """A prompt was being read, and the launching process requested a stop. Raised on all ranks.

    kept: tokens of the prompt that its session has.
    """

    def __init__(self, kept: int = 0) -> None:
        super().__init__()
        self.kept = kept


class RunError(RuntimeError):
    """A failure while running that one line explains, so that no traceback is needed."""


_PACKAGE = Path(__file__).parent
_OPTION = re.compile(r"`([a-z][a-z0-9_]*)`")
_WANTED = re.compile(r"(?:allocate|[Mm]map|wanted) (\d+(?:\.\d+)? ?(?:bytes|[KMGT]i?B)?)")
_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory", "bad_alloc")
_THREADS = ("can't start new thread", "Resource temporarily unavailable")


def explain(error: BaseException, during: str = "") -> str:
    """Return one line that says what went wrong, for any exception.

    The message of a UserError, a RunError or an OSError is that line. A lack of memory or threads
    is named, with the remedy and with `during`, what was being done. Anything else is a defect,
    with its type and place, to be reported.
    """
    text = text_of(error)
    where = f" during {during}" if during else f" in {_place(error)}"
    if isinstance(error, (UserError, RunError)):
        return text
    if is_out_of_memory(error):
        wanted = _WANTED.search(text)
        return (
            f"out of memory{where}" + (f" ({wanted[1]} more were needed)" if wanted else "") + "; "
            "use a shorter prompt, more ranks or a smaller model, or raise the limit (ulimit -v, "
            "the control group's)"
        )
    if isinstance(error, RuntimeError) and any(sign in text for sign in _THREADS):
        return (
            f"the system allows no more threads{where}; use fewer `threads`, or raise the limit "
            "(ulimit -u, the control group's pids.max)"
        )
    if isinstance(error, OSError):
        name = error.filename if isinstance(error.filename, (str, bytes)) else None
        told = f"{os.fsdecode(name)}: " if name else ""
        told += error.strerror or text or type(error).__name__
        if error.errno in (errno.EMFILE, errno.ENFILE):
            told += "; raise the limit of open files (ulimit -n), or use fewer ranks"
        return told
    if isinstance(error, ImportError) and text:
        return text
    message = f": {text}" if text else ""
    return (
        f"internal error: {type(error).__name__}{message} ({_place(error)}); please report this, "
        "with what CPTOOL_TRACEBACK=1 shows"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: Python's, the system's, or torch's on any device."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(sign in text_of(error) for sign in _MEMORY)


def show_traceback(error: BaseException) -> None:
    """Print the traceback on standard error if CPTOOL_TRACEBACK is set."""
    if os.environ.get("CPTOOL_TRACEBACK"):
        traceback.print_exception(type(error), error, error.__traceback__)


def as_options(message: str) -> str:
    """`message` with each name in backquotes written as an option: `top_p` becomes --top-p."""
    return _OPTION.sub(lambda named: "--" + named[1].replace("_", "-"), message)


def text_of(error: BaseException) -> str:
    """Return the message of an exception, in one line of bounded length."""
    try:
        text = str(error)
    except Exception:
        text = ""
    text = re.sub(r"^\[\S+:\d+\] ", "", " ".join(text.split()))  # torch's path of its own source
    return text if len(text) <= 600 else text[:600] + " ..."


def _place(error: BaseException) -> str:
    """File, line and function of the innermost frame in cptool, else of the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    if not frames:
        return "no frame"
    frame = (ours or frames)[-1]
    path = Path(frame.filename)
    shown = path.relative_to(_PACKAGE.parent) if ours else path.name
    return f"{shown}:{frame.lineno}, {frame.name}"
