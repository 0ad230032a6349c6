"""In which types a planned run computes and stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cptool.cli.options.common import DTYPES
from cptool.engine.options import EngineOptions
from cptool.engine.setup.types import check_kv_dtype, resolve_types
from cptool.errors import OptionError, UserError
from cptool.quantisation import AUTO, FP8_FEED_FORWARD, WEIGHTS

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.planning.hardware import HardwareProfile

type_options = (
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="auto",
        help="Type of the products, and of weights that do not stay as a file stores them.  "
        "[default: auto, what prefill would take for this checkpoint; bfloat16 for a shape]",
    ),
    click.option(
        "--kv-dtype",
        type=click.Choice(DTYPES),
        default="auto",
        help="Type in which keys and values are stored and sent.  [default: auto, that of --dtype]",
    ),
    click.option(
        "--weights",
        type=click.Choice((*WEIGHTS, AUTO)),
        help="Plan for a checkpoint's float weights as they are, or quantised while loading.  "
        "[default: file]",
    ),
)


def planned_types(
    dtype: str, options: EngineOptions, device: str, checkpoint: Checkpoint | None
) -> tuple[str, str, str]:
    """Return the types of the products and of KV, and the weights; for "auto" those that `cptool
    prefill` takes.

    Without a checkpoint, for a shape, it is bfloat16. Raises OptionError for types that do not go
    together.
    """
    if checkpoint is not None:
        dtype, options = resolve_types(dtype, options, checkpoint, device)
        return dtype, options.kv_dtype, options.weights or "file"
    if options.weights not in (None, "file"):
        rule = "a shape has no weights to quantise"
        raise OptionError("weights", options.weights, rule, "name a checkpoint, or leave it out")
    dtype = "bfloat16" if dtype == "auto" else dtype
    kv_dtype = dtype if options.kv_dtype == "auto" else options.kv_dtype
    check_kv_dtype(kv_dtype, dtype, device)
    return dtype, kv_dtype, "file"


def feed_forward(
    fp8: bool | None, dtype: str, profile: HardwareProfile, weights: str
) -> str | None:
    """Return the dtype of the feed-forward layers, None for that of the others.

    fp8: what is requested, None for what `weights` or the profile says. Raises UserError for a
    dtype that the profile has no rate for.
    """
    if dtype not in profile.linear_flops or dtype not in profile.attention_flops:
        known = sorted(set(profile.linear_flops) & set(profile.attention_flops))
        raise OptionError(
            "dtype", dtype, f"{profile.name} has no rate for it", f"use {' or '.join(known)}"
        )
    if weights == FP8_FEED_FORWARD and fp8 is None:
        return "float8"
    chosen = profile.feed_forward if fp8 is None else "float8" if fp8 else None
    if chosen and chosen not in profile.linear_flops:
        raise UserError(f"`fp8`: {profile.name} has no FP8 rate; leave it out")
    return chosen


def without_fp8(weights: str, dtype: str, profile: HardwareProfile) -> list[str]:
    """Return the note that products of `weights` in FP8 take longer than planned, if they do."""
    if weights != FP8_FEED_FORWARD or "float8" in profile.linear_flops:
        return []
    return [
        f"{profile.name} has no FP8 products: memory is planned for --weights {weights}, times are "
        f"those of {dtype}, and widening the weights for each product takes longer"
    ]
