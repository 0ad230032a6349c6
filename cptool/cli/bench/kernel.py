"""What `bench attention` and `bench merge` share: one kernel after the other in this process."""

from collections.abc import Callable, Sequence

import click

from cptool.cli import draw
from cptool.cli.bench.options import KINDS
from cptool.cli.options import stack

kernel_options = stack(
    click.option(
        "--head-dim",
        "-d",
        type=click.IntRange(8, 256),
        multiple=True,
        default=(128,),
        show_default=True,
    ),
    click.option(
        "--dtype",
        "dtypes",
        type=click.Choice(KINDS),
        multiple=True,
        default=("float32", "bfloat16"),
        show_default=True,
    ),
)


def one_device(device: str, threads: int | None) -> str:
    """The device, resolved, with the threads of this process set."""
    from cptool.distributed import devices, options

    options.check_threads(threads)
    device = devices.resolve_device(device)
    import torch

    torch.set_num_threads(threads or devices.cores())
    return device


def collect(
    what: str, measure: Callable, shapes: Sequence, device: str, repeats: int
) -> dict[str, object]:
    """What `measure` yields for each of `shapes`, with where it was measured."""
    import torch

    results = []
    with draw.counting(what, len(shapes)) as advance:
        for result in measure(shapes, device, repeats):
            results.append(result)
            advance()
    return {"device": device, "threads": torch.get_num_threads(), "results": results}
