"""The `cptool` command: finds the subcommand, and turns what goes wrong into one line and an exit
code.
"""

import importlib
import os
import sys

import click

import cptool
from cptool.errors import UserError
from cptool.termination import orderly

# Threads that spin while they wait take the cores from ranks and from our kernels' threads: on two
# busy cores a decode step took 20 times as long. Read by OpenMP when torch is imported, so it is
# set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

COMMANDS = (
    "prefill", "decode", "chat", "session", "verify", "plan", "bench", "pull", "demo", "doctor",
)  # fmt: skip

# From click 8.2 on; before, click shows the help by itself.
_NO_ARGUMENTS = getattr(click.exceptions, "NoArgsIsHelpError", ())


class Commands(click.Group):
    """Subcommands imported when they are asked for; mistakes told in one line.

    Exit codes: 0 done, 1 a failure while running, 2 the user's mistake, 130 interrupted.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"cptool.cli.{name}"), name)

    def main(self, *args, standalone_mode: bool = True, **kwargs):
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        try:
            with orderly():
                sys.exit(super().main(*args, standalone_mode=False, **kwargs) or 0)
        except _NO_ARGUMENTS as error:
            error.show()
            sys.exit(2)
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "cptool"
            self._fail(2, f"{where}: {error.format_message()} (see {where} --help)")
        except (click.ClickException, UserError) as error:
            message = (
                error.format_message() if isinstance(error, click.ClickException) else str(error)
            )
            self._fail(2, f"cptool: {message}")
        except (KeyboardInterrupt, click.Abort):
            self._fail(130, "cptool: interrupted")
        except OSError as error:
            where = f"{error.filename}: " if error.filename is not None else ""
            self._fail(1, f"cptool: {where}{error.strerror or error}")
        except (RuntimeError, ImportError, MemoryError) as error:
            self._fail(1, f"cptool: {error or type(error).__name__}")

    @staticmethod
    def _fail(code: int, message: str) -> None:
        click.echo(" ".join(message.split()), err=True)
        # A KeyboardInterrupt that left the `exec` of a string, which importing a dataclass is full
        # of, has Python end by SIGINT whatever the exit code; the next `exec` forgets it.
        exec("")
        sys.exit(code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(cptool.__version__, prog_name="cptool")
def main() -> None:
    """Exact long-context inference of Llama-family models, split over ranks by context."""
