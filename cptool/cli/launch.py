"""Running a turn on ranks, with its progress shown."""

import os
import sys
from typing import TYPE_CHECKING

from cptool.cli import draw
from cptool.cli.progress import progress
from cptool.cli.streams import replace_what_cannot_be_encoded
from cptool.distributed import launch
from cptool.distributed.options import RankOptions
from cptool.engine.turn import Report, Turn, run
from cptool.errors import RunError

if TYPE_CHECKING:
    from cptool.distributed.world import World


def run_turn(turn: Turn, ranks: RankOptions, *, stream: bool = False) -> Report | None:
    """Run the turn and return the report of rank 0; None in the other processes of a launcher.

    With `stream`, rank 0 writes the answer to standard output as it comes, which takes a single
    sequence and a tokenizer.
    """
    with progress(quiet=stream) as watch:
        report, rank = launch.run(
            _on_rank,
            turn,
            stream,
            ranks=ranks,
            watch=watch,
        )
    if rank:
        return None
    rate = report.flops / report.ttft_s / (report.cp * report.tp)
    if report.ceiling_flops is not None and rate > report.ceiling_flops:
        # Ranks that attend to their own tokens alone have such rates.
        draw.say(
            f"{rate / 1e12:.3g} TFLOP/s per rank is more than this hardware can do "
            f"({report.ceiling_flops / 1e12:.3g}): something was not computed; check with: "
            "cptool verify MODEL"
        )
    return report


def _on_rank(world: "World", turn: Turn, stream: bool) -> tuple[Report, int]:
    if not stream or world.rank:
        return run(world, turn), world.rank
    from cptool.checkpoint import open_checkpoint

    tokenizer = open_checkpoint(turn.model).tokenizer()
    assert tokenizer is not None  # the caller streams only with one
    text, output = tokenizer.stream(), Output()
    report = run(world, turn, lambda sequence, token: output.write(text.push(token)))
    output.write(text.flush() + "\n")
    if output.fault:
        raise RunError(f"standard output cannot be written ({output.fault}); the turn was computed")
    return report, world.rank


class Output:
    """Standard output, or nowhere once it fails, because the turn is still to be saved.

    `fault` is why it failed, None if its reader merely closed it.
    """

    def __init__(self) -> None:
        self.fault: str | None = None
        replace_what_cannot_be_encoded()  # rank 0 may be a process of its own

    def write(self, text: str) -> None:
        if sys.stdout is None:  # closed from the beginning
            return
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.fault = error.strerror
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
