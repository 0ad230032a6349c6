"""The `cptool` command: find the subcommand, and turn an error into one line and an exit code."""

import importlib
import os
import signal
import sys
from typing import Any

import click

import cptool
from cptool.cli import streams, verbosity
from cptool.cli.options.examples import examples
from cptool.cli.options.variables import with_origins
from cptool.distributed import signals
from cptool.distributed.signals import orderly
from cptool.errors import UserError, as_options, explain, show_traceback

# Threads that spin while they wait take cores from ranks and from our kernels' threads: on two busy
# cores a decode step took 20 times as long. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

COMMANDS = {
    "generate": "generate",
    "prefill": "prefill",
    "decode": "decode",
    "chat": "chat.command",
    "session": "session",
    "verify": "verify",
    "plan": "plan.command",
    "bench": "bench.group",
    "pull": "pull.command",
    "models": "models",
    "demo": "demo",
    "doctor": "doctor.command",
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
        command = getattr(importlib.import_module(f"cptool.cli.{COMMANDS[name]}"), name)
        verbosity.add_options(command)
        return command

    # click treats an end of file as a Ctrl-C, and any broken pipe as one of the output.

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except (EOFError, KeyboardInterrupt, OSError) as error:
            raise _Escaped(error) from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            _check_directory()
            return super().invoke(ctx)
        except (EOFError, KeyboardInterrupt, OSError) as error:
            raise _Escaped(error) from error

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("standalone_mode", True):
            return super().main(*args, **kwargs)
        verbosity.reset()
        origins: dict[str, str] = {}  # options whose values are from the environment, and variables
        try:
            code, line = self._run(*args, **{**kwargs, "obj": origins})
        except KeyboardInterrupt:
            code, line = 130, "cptool: interrupted"
        # The outcome is known: from here on a Ctrl-C would only interrupt Python's own shutdown.
        if isinstance(signal.getsignal(signal.SIGINT), signals.Interrupt):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        fault = streams.finish()
        if fault is not None and code in (0, 1):
            code, line = 1, f"cptool: {streams.OUTPUT}: {fault.strerror}"
        if line is not None:
            signals.claim_or_wait()
            newline = "\n" if code == 130 and sys.stderr.isatty() else ""  # after the ^C
            line = with_origins(" ".join(line.split()), origins)
            click.echo(newline + line, err=True)
        # A KeyboardInterrupt that left the `exec` of a string, which importing a dataclass is full
        # of, has Python end by SIGINT whatever the exit code; the next `exec` forgets it.
        exec("")
        sys.exit(code)

    def _run(self, *args: Any, **kwargs: Any) -> tuple[int, str | None]:
        """Run the command; return the exit code, and the line that explains one other than 0."""
        try:
            with orderly():
                return super().main(*args, **{**kwargs, "standalone_mode": False}) or 0, None
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
        except BaseException as error:  # a panic in Rust is not an Exception
            return self._failed(error.cause if isinstance(error, _Escaped) else error)

    @staticmethod
    def _failed(error: BaseException) -> tuple[int, str | None]:
        if isinstance(error, KeyboardInterrupt):
            return 130, f"cptool: {str(error) or 'interrupted'}"
        if isinstance(error, BrokenPipeError) and error.filename == streams.OUTPUT:
            return 1, None
        show_traceback(error)
        return 2 if isinstance(error, UserError) else 1, f"cptool: {as_options(explain(error))}"


def _check_directory() -> None:
    """Raise UserError if the current directory was removed: some libraries abort then."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current directory was removed; change to one that exists") from None


class _Escaped(Exception):
    """Carries an exception past click."""

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause


_EPILOG = f"""{
    examples(
        "cptool demo",
        'cptool generate MODEL --chat --file doc.txt --prompt "Sum it up." --cp 2',
        "cptool plan llama3-8b --context 128K",
    )
}

\b
Words: a rank is a process with a device, or a share of the processor's cores,
of its own. KV are the keys and values that attention keeps of each token.
Context parallelism (cp) gives each rank a part of the tokens and their KV;
tensor parallelism (tp) gives each rank a part of every layer.

\b
Variables of the environment give options a default: CPTOOL_CP, CPTOOL_TP,
CPTOOL_DEVICE, CPTOOL_DTYPE, CPTOOL_THREADS, CPTOOL_TIMEOUT, CPTOOL_VARIANT.
docs/environment.md lists all variables that cptool reads.
"""


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.version_option(cptool.__version__, prog_name="cptool")
def main() -> None:
    """Exact long-context inference of Llama-family models, split over ranks by context."""


verbosity.add_options(main)
