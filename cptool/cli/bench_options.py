"""What the subcommands of `cptool bench` share: options, and how results are given out."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from cptool.cli.options import DTYPES, VARIANTS, _stack, json_option

KINDS = DTYPES[1:]

measure_options = _stack(
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto"),
    click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads a rank."),
    click.option(
        "--repeats",
        type=click.IntRange(min=1),
        default=5,
        show_default=True,
        help="Interleaved rounds; one more warms up.",
    ),
    click.option(
        "--plot",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Draw the results, as PNG, SVG or PDF.",
    ),
    json_option,
)

model_options = _stack(
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

DEFAULT_VARIANTS = ("auto", "pass-kv", "gather-kv", "pass-q", "gather-q")


class Heads(click.ParamType):
    """QUERY/KV heads, such as 32/8."""

    name = "heads"

    def convert(self, value, param, ctx) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)/(\d+)", value)
        query, kv = (int(match[1]), int(match[2])) if match else (0, 0)
        if not query or not kv or query % kv:
            self.fail(
                f"{value!r} must be QUERY/KV heads, the first a multiple of the second, "
                "such as 32/8",
                param,
                ctx,
            )
        return query, kv


class Bytes(click.ParamType):
    """A size such as 1K, 4M or 65536; units are powers of two."""

    name = "bytes"

    def convert(self, value, param, ctx) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)([kmg]?)", value.strip().lower())
        size = int(match[1]) << 10 * " kmg".index(match[2] or " ") if match else 0
        if size < 1:
            self.fail(f"{value!r} must be a positive number of bytes, such as 1K or 4M", param, ctx)
        return size


def resolve_ranks(ranks: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """The N asked for, ascending, and checked against the launcher; the largest fills the world."""
    from cptool import distributed

    launched = distributed.launched_size()
    if not ranks:
        ranks = (launched // tp,) if launched else (1, 2)
    ranks = tuple(sorted(set(ranks)))
    distributed.check_size(ranks[-1], tp)
    return ranks


def one_device(device: str, threads: int | None) -> str:
    """For what runs in this process: the device, with its threads set."""
    from cptool import distributed

    device = distributed.resolve_device(device)
    import torch

    torch.set_num_threads(threads or distributed.cores())
    return device


def emit(
    fields: dict[str, Any],
    *,
    as_json: bool,
    columns: Sequence[str],
    row: Callable[[dict[str, Any]], Sequence[str]],
    caption: str,
) -> None:
    """`fields` under the circumstances as one JSON object, or its "results" as a table."""
    from cptool.bench.measure import circumstances

    if as_json:
        click.echo(json.dumps({**circumstances(), **fields}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), header_style="bold", caption=caption)
    table.caption_justify = "left"
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for result in fields["results"]:
        table.add_row(*row(result))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(table)


def spread(summary: dict[str, float], scale: float = 1e3) -> str:
    """Median (least to most), in milliseconds."""
    median, low, high = (f"{scale * summary[key]:.4g}" for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
