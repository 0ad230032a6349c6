"""The options that say how the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from cptool.cli.options.records import as_object

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.engine.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """The sampling that the user requested; None where that is left to the model's author."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0

    def resolve(self, checkpoint: Checkpoint) -> Sampling:
        """Return the sampling; the author's temperature and top-p count where none was given.

        Greedy where the author gives no temperature either. Raises UserError for a value out of
        range.
        """
        from cptool.engine.sampling import resolve

        return resolve(checkpoint.sampling, self.temperature, self.top_p, seed=self.seed)

    def describe(self, sampling: Sampling) -> str:
        """Return one line with the values of `sampling`, the result of `resolve`, and who chose."""
        if not sampling.temperature:
            return "greedy"
        line = f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
        if self.temperature is None:
            line += " (the model author's; --temperature 0 is greedy)"
        return line


sampling_options = as_object(
    "sampler",
    SamplingRequest,
    [
        click.option(
            "--temperature",
            type=float,
            help="0 is greedy.  [default: the model author's, else 0]",
        ),
        click.option(
            "--top-p",
            type=float,
            help="Draw from the likeliest tokens of this mass.  [default: the model author's, else "
            "1]",
        ),
        click.option("--seed", type=int, default=0, help="Seed of the draws.  [default: 0]"),
    ],
)
