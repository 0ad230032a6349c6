"""The option for several answers to each prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cptool.cli import draw

if TYPE_CHECKING:
    from cptool.engine.sampling import Sampling

samples_option = click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=1,
    metavar="K",
    help="Answer each prompt K times, with other draws each time; the prompt is read and kept in "
    "memory once.  [default: 1]",
)


def check_samples(samples: int, sampling: Sampling, session: Path | None) -> None:
    """Raise UsageError for several answers and a session; say so if they will all be the same."""
    from cptool.distributed.environment import is_first_rank

    if samples == 1:
        return
    if session is not None:
        raise click.UsageError(
            f"--samples {samples}: a session keeps one answer to a prompt; leave --session out, or "
            "--samples"
        )
    if not sampling.temperature and is_first_rank():
        draw.say(
            f"--samples {samples}: at temperature 0 all answers to a prompt are the same; "
            "--temperature 0.8, say, draws them",
            always=True,
        )
