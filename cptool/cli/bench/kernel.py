"""What `bench attention` and `bench merge` share: kernels measured in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from cptool.cli.bench.options import KINDS, MeasureOptions
from cptool.cli.options.records import as_object
from cptool.cli.progress import counting
from cptool.distributed.options import check_threads


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """The widths of heads and the dtypes to measure."""

    head_dim: tuple[int, ...]
    dtypes: tuple[str, ...]


kernel_options = as_object(
    "kernel",
    KernelOptions,
    [
        click.option(
            "--head-dim",
            "-d",
            type=click.IntRange(8, 256),
            multiple=True,
            default=(128,),
            show_default=True,
            help="Width of a head, an even number.",
        ),
        click.option(
            "--dtype",
            "dtypes",
            type=click.Choice(KINDS),
            multiple=True,
            default=("float32", "bfloat16"),
            show_default=True,
            help="Type of the inputs.",
        ),
    ],
)


def collect(
    what: str, measure: Callable[..., Any], shapes: Sequence[Any], measuring: MeasureOptions
) -> dict[str, Any]:
    """Return what `measure` yields for each of `shapes`, with where it was measured.

    Sets the number of threads of this process.
    """
    from cptool.distributed import devices

    check_threads(measuring.threads)
    device = devices.resolve_device(measuring.device)
    import torch

    torch.set_num_threads(measuring.threads or devices.cores())
    results = []
    with counting(what, len(shapes)) as advance:
        for result in measure(shapes, device, measuring.repeats):
            results.append(result)
            advance()
    return {"device": device, "threads": torch.get_num_threads(), "results": results}
