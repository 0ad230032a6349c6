"""What `bench prefill` and `bench decode` share: sweeps over a model of random weights, with what
was predicted beside what was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from cptool.cli import draw
from cptool.cli.bench.options import KINDS
from cptool.cli.options import VARIANTS, stack
from cptool.variants import names

if TYPE_CHECKING:
    from cptool.cli.plot import Line
    from cptool.distributed.options import RankOptions
    from cptool.model.config import LlamaConfig

DEFAULT_VARIANTS = ("auto", *names())

model_options = stack(
    click.option(
        "--cp",
        "ranks",
        type=click.IntRange(min=1),
        multiple=True,
        metavar="N",
        help="Context-parallel ranks; repeat to compare.  [default: 1 and 2, or what the launcher "
        "started]",
    ),
    click.option("--tp", type=click.IntRange(min=1), default=1, metavar="M", show_default=True),
    click.option(
        "--variant",
        "variants",
        type=click.Choice(VARIANTS),
        multiple=True,
        help="Repeat to compare.  [default: auto and the four that it chooses from]",
    ),
    click.option(
        "--layers",
        type=click.IntRange(min=1),
        default=2,
        show_default=True,
        help="Cut the model to this many layers.",
    ),
    click.option("--dtype", type=click.Choice(KINDS), default="bfloat16", show_default=True),
    click.option(
        "--calibrate",
        is_flag=True,
        help="Measure the hardware on these ranks first, for auto and for the predictions; nothing "
        "is kept.",
    ),
)


def check(model: str, ranks: tuple[int, ...], tp: int) -> tuple[LlamaConfig, tuple[int, ...]]:
    """The shape of MODEL, and the N asked for, ascending; the largest fills the world."""
    from cptool.checkpoint.shapes import find_shape
    from cptool.distributed.environment import launched_size
    from cptool.distributed.options import check_size
    from cptool.model import shares

    config = find_shape(model)
    shares.check(config, tp)
    launched = launched_size()
    if not ranks:
        ranks = (launched // tp,) if launched else (1, 2)
    ranks = tuple(sorted(set(ranks)))
    check_size(ranks[-1], tp)
    return config, ranks


def measured(measure: Callable, sweep, ranks: RankOptions) -> dict[str, object] | None:
    """Return what `measure` reports of `sweep` on `ranks`; None on all ranks but the first."""
    from cptool.distributed import launch

    with draw.progress() as watch:
        fields, rank = launch.run(_on_rank, measure, sweep, ranks=ranks, watch=watch)
    return None if rank else fields


def _on_rank(world, measure, sweep):
    import torch

    fields = measure(world, sweep)
    return {"device": world.device.type, "threads": torch.get_num_threads(), **fields}, world.rank


def head(model: str, config: LlamaConfig, sweep, tp: int) -> dict[str, object]:
    """What JSON says of the model that was cut for `sweep`."""
    return {
        "model": model,
        "layers": sweep.config.num_hidden_layers,
        "model_layers": config.num_hidden_layers,
        "vocabulary": sweep.config.vocab_size,
        "dtype": sweep.dtype,
        "tp": tp,
    }


def title(model: str, config: LlamaConfig, sweep) -> str:
    return f"{model}, {sweep.config.num_hidden_layers} of {config.num_hidden_layers} layers"


def asked(result) -> str:
    """The variant asked for, and what auto took."""
    if result["asked"] != "auto" or result["ranks"] == 1:
        return result["variant"] if result["ranks"] > 1 else ""
    few = f" on {result['active']}" if result["active"] < result["ranks"] else ""
    return f"auto: {result['variant']}{few}"


def kind(result) -> str | None:
    """The line of a plot that a result is a point of; None for what auto took, which has one."""
    if result["ranks"] == 1:
        return "N = 1"
    return None if result["asked"] == "auto" else f"N = {result['ranks']}, {result['variant']}"


def curves(kinds: dict[str, list], x: str, time: str, scale: float = 1.0) -> list[Line]:
    """For each kind, `scale` times the seconds `time` measured over `x`, and those predicted."""
    from cptool.cli.plot import Line

    lines = []
    for name, rows in kinds.items():
        rows = sorted(rows, key=lambda r: r[x])
        at = [r[x] for r in rows]
        median, low, high = (
            [scale * r[time][key] for r in rows] for key in ("median", "min", "max")
        )
        lines.append(Line(name, at, median, low=low, high=high))
        predicted = [scale * r["predicted_s"] for r in rows]
        lines.append(Line("predicted", at, predicted, dashed=True))
    return lines
