"""The `cptool` command: find the subcommand, and turn an error into one line and an exit code."""

import importlib
import os
import signal
import sys
import threading

import click

import cptool
from cptool.cli import streams
from cptool.distributed import signals
from cptool.distributed.signals import orderly
from cptool.errors import UserError, as_options, explain, show_traceback

# Threads that spin while they wait take the cores from ranks and from our kernels' threads: on two
# busy cores a decode step took 20 times as long. Read by OpenMP when torch is imported, so it is
# set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

COMMANDS = {
    "prefill": "prefill",
    "decode": "decode",
    "chat": "chat.command",
    "session": "session",
    "verify": "verify",
    "plan": "plan.command",
    "bench": "bench.group",
    "pull": "pull",
    "demo": "demo",
    "doctor": "doctor",
}
"""Subcommands, in the order of the help, and their modules in `cptool.cli`."""

# From click 8.2 on; before, click shows the help by itself.
_NO_ARGUMENTS = getattr(click.exceptions, "NoArgsIsHelpError", ())


class Commands(click.Group):
    """Subcommands that are imported on demand; mistakes are reported in one line.

    Exit codes: 0 done, 1 a failure while running, 2 the user's mistake, 130 interrupted.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"cptool.cli.{COMMANDS[name]}"), name)

    # click takes an end of file for a Ctrl-C, and any broken pipe for one of the output.

    def make_context(self, *args, **kwargs) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except (EOFError, KeyboardInterrupt, OSError) as error:
            raise _Escaped from error

    def invoke(self, ctx: click.Context):
        try:
            _check_directory()
            return super().invoke(ctx)
        except (EOFError, KeyboardInterrupt, OSError) as error:
            raise _Escaped from error

    def main(self, *args, standalone_mode: bool = True, **kwargs):
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        try:
            code, line = self._run(*args, **kwargs)
        except KeyboardInterrupt:
            code, line = 130, "cptool: interrupted"
        # It is decided: a Ctrl-C from here on would only break into Python's own end.
        if isinstance(signal.getsignal(signal.SIGINT), signals.Interrupt):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        fault = streams.finish()
        if fault is not None and code in (0, 1):
            code, line = 1, f"cptool: {streams.OUTPUT}: {fault.strerror}"
        if line is not None:
            newline = "\n" if code == 130 and sys.stderr.isatty() else ""  # after the ^C
            click.echo(newline + " ".join(line.split()), err=True)
        if any(thread.name == "cptool-ranks" for thread in threading.enumerate()):
            # A rank that computes in this process would do so while the interpreter is torn down.
            sys.stderr.flush()
            os._exit(code)
        # A KeyboardInterrupt that left the `exec` of a string, which importing a dataclass is full
        # of, has Python end by SIGINT whatever the exit code; the next `exec` forgets it.
        exec("")
        sys.exit(code)

    def _run(self, *args, **kwargs) -> tuple[int, str | None]:
        """Exit code, and the line that says why if it is not 0."""
        try:
            with orderly():
                return super().main(*args, standalone_mode=False, **kwargs) or 0, None
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else 0, None
        except _NO_ARGUMENTS as error:
            error.show()
            return 2, None
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "cptool"
            return 2, f"{where}: {error.format_message()} (see {where} --help)"
        except click.ClickException as error:
            return 2, f"cptool: {error.format_message()}"
        except click.Abort:
            return 130, "cptool: interrupted"
        except BaseException as error:  # also what is no Exception, as a panic of Rust is
            return self._failed(error.__cause__ if isinstance(error, _Escaped) else error)

    @staticmethod
    def _failed(error: BaseException) -> tuple[int, str | None]:
        if isinstance(error, KeyboardInterrupt):
            return 130, "cptool: interrupted"
        if isinstance(error, BrokenPipeError) and error.filename == streams.OUTPUT:
            return 1, None
        show_traceback(error)
        return 2 if isinstance(error, UserError) else 1, f"cptool: {as_options(explain(error))}"


def _check_directory() -> None:
    """UserError where the current directory was removed: some libraries end the process then."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current directory is gone; change to one that is there") from None


class _Escaped(Exception):
    """Carries an exception, its cause, past click."""


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(cptool.__version__, prog_name="cptool")
def main() -> None:
    """Exact long-context inference of Llama-family models, split over ranks by context."""
