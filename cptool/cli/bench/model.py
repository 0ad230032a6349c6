"""What `bench prefill` and `bench decode` share: sweeps over a model of random weights, predicted
beside measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from cptool.cli.bench.options import KINDS, MeasureOptions
from cptool.cli.options.common import DTYPES
from cptool.cli.options.ranks import VARIANTS
from cptool.cli.options.records import as_object
from cptool.cli.progress import progress
from cptool.cli.turn_report import types_of
from cptool.distributed.devices import resolve_device
from cptool.engine.setup.types import check_kv_dtype
from cptool.variants import names

if TYPE_CHECKING:
    from cptool.cli.figures.plot import Line
    from cptool.distributed.world import World
    from cptool.model.config import LlamaConfig

DEFAULT_VARIANTS = ("auto", *names())


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The ranks and variants to compare, and the model of random weights to do it on."""

    ranks: tuple[int, ...]
    tp: int
    variants: tuple[str, ...]
    layers: int
    dtype: str
    kv_dtype: str
    calibrate: bool

    def checked(self, config: LlamaConfig) -> SweepOptions:
        """Return these options with `ranks` ascending; the largest number fills the world.

        Raises UserError where the model does not divide over the ranks, or the launcher's world
        does not fit.
        """
        from cptool.distributed.environment import launched_size
        from cptool.distributed.options import check_size
        from cptool.model import shares

        shares.check(config, self.tp)
        launched, ranks = launched_size(), self.ranks
        if not ranks:
            ranks = (launched // self.tp,) if launched else (1, 2)
        ranks = tuple(sorted(set(ranks)))
        check_size(ranks[-1], self.tp)
        return replace(self, ranks=ranks)

    def fields(self, config: LlamaConfig) -> dict[str, Any]:
        """Return the fields that the sweeps of prefill and decode share, for a model cut to
        `layers`.
        """
        from cptool.calibration.rig import cut

        kv_dtype = self.dtype if self.kv_dtype == "auto" else self.kv_dtype
        check_kv_dtype(kv_dtype, self.dtype, resolve_device("auto"))
        return {
            "config": cut(config, self.layers),
            "dtype": self.dtype,
            "kv_dtype": kv_dtype,
            "ranks": self.ranks,
            "variants": self.variants or DEFAULT_VARIANTS,
            "calibrated": self.calibrate,
        }


sweep_options = as_object(
    "swept",
    SweepOptions,
    [
        click.option(
            "--cp",
            "ranks",
            type=click.IntRange(min=1),
            multiple=True,
            metavar="N",
            help="Context-parallel ranks; repeat to compare.  [default: 1 and 2, or what the "
            "launcher started]",
        ),
        click.option(
            "--tp",
            type=click.IntRange(min=1),
            default=1,
            metavar="M",
            show_default=True,
            help="Tensor-parallel ranks for each context-parallel one.",
        ),
        click.option(
            "--variant",
            "variants",
            type=click.Choice(VARIANTS),
            multiple=True,
            help="How attention crosses ranks; repeat to compare.  [default: auto "
            "and the four that it chooses from]",
        ),
        click.option(
            "--layers",
            type=click.IntRange(min=1),
            default=2,
            show_default=True,
            help="Cut the model to this many layers.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(KINDS),
            default="bfloat16",
            show_default=True,
            help="Type of weights and products.",
        ),
        click.option(
            "--kv-dtype",
            type=click.Choice(DTYPES),
            default="auto",
            help="Type in which keys and values are stored and sent.  [default: auto, that of "
            "--dtype]",
        ),
        click.option(
            "--calibrate",
            is_flag=True,
            help="Measure the hardware on these ranks first, for auto and for the predictions; "
            "nothing is kept.",
        ),
    ],
)


def measured(
    measure: Callable[..., Any], sweep: Any, tp: int, measuring: MeasureOptions
) -> dict[str, Any] | None:
    """Return what `measure` reports of `sweep`; None on all ranks but the first.

    The world has as many ranks as the sweep's largest number needs.
    """
    from cptool.distributed import launch
    from cptool.distributed.options import RankOptions
    from cptool.engine.rank_modules import rank_modules

    ranks = RankOptions(
        cp=sweep.ranks[-1], tp=tp, device=measuring.device, threads=measuring.threads
    )
    with progress() as watch:
        fields, rank = launch.run(
            _on_rank, measure, sweep, ranks=ranks, watch=watch, preload=rank_modules()
        )
    return None if rank else fields


def _on_rank(world: World, measure: Callable[..., Any], sweep: Any) -> tuple[dict[str, Any], int]:
    import torch

    fields = measure(world, sweep)
    return {"device": world.device.type, "threads": torch.get_num_threads(), **fields}, world.rank


def head(model: str, config: LlamaConfig, sweep: Any, tp: int) -> dict[str, Any]:
    """Return what --json prints of the model that was cut for `sweep`."""
    return {
        "model": model,
        "layers": sweep.config.num_hidden_layers,
        "model_layers": config.num_hidden_layers,
        "vocabulary": sweep.config.vocab_size,
        "dtype": sweep.dtype,
        "kv_dtype": sweep.kv_dtype,
        "tp": tp,
    }


def title(model: str, config: LlamaConfig, sweep: Any) -> str:
    """Return the model's name and how many of its layers were measured."""
    return f"{model}, {sweep.config.num_hidden_layers} of {config.num_hidden_layers} layers"


def caption(title: str, sweep: Any, note: str, profile: dict[str, Any]) -> str:
    """Return what a table says of the model, its columns (`note`) and the predictions."""
    measured = profile["measurement"]
    source = f"calibrated {measured['date']}" if measured else "defaults, not calibrated here"
    return (
        f"{title}, random weights, vocabulary of {sweep.config.vocab_size:,}, {types_of(sweep)}. "
        f"{note} Predicted from: {profile['name']} ({source})."
    )


def asked(result: dict[str, Any]) -> str:
    """Return the variant as a table shows it: the one requested, and what auto chose."""
    if result["asked"] != "auto" or result["ranks"] == 1:
        return result["variant"] if result["ranks"] > 1 else ""
    few = f" on {result['active']}" if result["active"] < result["ranks"] else ""
    return f"auto: {result['variant']}{few}"


def kind(result: dict[str, Any]) -> str | None:
    """Return the plotted line to which a result belongs, None for auto's, which has one already."""
    if result["ranks"] == 1:
        return "N = 1"
    return None if result["asked"] == "auto" else f"N = {result['ranks']}, {result['variant']}"


def curves(
    kinds: dict[str, list[dict[str, Any]]], x: str, time: str, scale: float = 1.0
) -> list[Line]:
    """Return for each kind a line of `scale` times its seconds `time` over `x`, and one of those
    predicted.
    """
    from cptool.cli.figures.plot import Line

    lines = []
    for name, rows in kinds.items():
        rows = sorted(rows, key=lambda r: r[x])
        at = [r[x] for r in rows]
        median, low, high = (
            [scale * r[time][key] for r in rows] for key in ("median", "min", "max")
        )
        lines.append(Line(label=name, x=at, y=median, band=(low, high)))
        predicted = [scale * r["predicted_s"] for r in rows]
        lines.append(Line(label="predicted", x=at, y=predicted, dashed=True))
    return lines
