"""Runs a turn on the ranks that were asked for, and shows how far they are."""

import sys
from typing import TYPE_CHECKING

from cptool import distributed
from cptool.cli import draw
from cptool.cli.options import Ranks
from cptool.turn import Report, Turn, run

if TYPE_CHECKING:
    from cptool.distributed import World


def run_turn(turn: Turn, ranks: Ranks, *, stream: bool = False) -> Report | None:
    """The report of rank 0; None in the other processes of a launcher.

    With `stream`, rank 0 writes the answer to standard output as it comes, for a single sequence
    with a tokenizer.
    """
    with draw.progress(quiet=stream) as watch:
        report, rank = distributed.run(
            _on_rank,
            turn,
            stream,
            cp=ranks.cp,
            tp=ranks.tp,
            device=ranks.device,
            threads=ranks.threads,
            timeout=ranks.timeout,
            watch=watch,
        )
    return report if rank == 0 else None


def _on_rank(world: "World", turn: Turn, stream: bool) -> tuple[Report, int]:
    if not stream or world.rank:
        return run(world, turn), world.rank
    from cptool.checkpoint import open_checkpoint

    text = open_checkpoint(turn.model).tokenizer().stream()

    def emit(sequence: int, token: int) -> None:
        sys.stdout.write(text.push(token))
        sys.stdout.flush()

    report = run(world, turn, emit)
    sys.stdout.write(text.flush() + "\n")
    sys.stdout.flush()
    return report, world.rank
