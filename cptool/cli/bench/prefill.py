"""`cptool bench prefill`: time to the first token, measured beside predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cptool.cli.bench.model import (
    SweepOptions,
    asked,
    caption,
    curves,
    head,
    kind,
    measured,
    sweep_options,
    title,
)
from cptool.cli.bench.options import (
    SPREAD,
    MeasureOptions,
    emit,
    grouped,
    measure_options,
    spread,
)
from cptool.cli.figures import plot as plots
from cptool.cli.figures.tables import Column
from cptool.cli.options import completion
from cptool.cli.options.examples import examples
from cptool.cli.options.models import open_shape
from cptool.cli.options.types import TokenCount
from cptool.units import duration, flop_rate, percent, size, three


@click.command(
    short_help="Prefill over contexts, miss rates, ranks and variants.",
    epilog=examples(
        "cptool bench prefill llama3-8b --context 4K --cp 1 --cp 2",
        "cptool bench prefill MODEL --context 8K --miss-rate 0.05 --miss-rate 1",
    ),
)
@click.argument("model", metavar="MODEL|SHAPE", shell_complete=completion.shapes)
@click.option(
    "--context",
    "contexts",
    type=TokenCount(),
    multiple=True,
    default=(1024, 4096),
    show_default=True,
    help="Tokens in all; repeat to compare.",
)
@click.option(
    "--miss-rate",
    "miss_rates",
    type=click.FloatRange(0, 1, min_open=True),
    multiple=True,
    default=(1.0,),
    show_default=True,
    help="Part of the context that is new, T / (T + P), where P tokens are cached.",
)
@sweep_options
@measure_options
def prefill(
    model: str,
    contexts: tuple[int, ...],
    miss_rates: tuple[float, ...],
    swept: SweepOptions,
    measuring: MeasureOptions,
) -> None:
    """Sweep contexts, miss rates, ranks and variants; predicted stands beside measured.

    MODEL is a directory, a .gguf file, a name such as llama3-8b or a config.json. Only its shape
    counts: the weights are random, cut to a few layers and a small vocabulary, and so are cached
    tokens. All N take turns in one world, so that they are measured interleaved, with the same
    threads per rank.
    """
    measuring.check()
    config = open_shape(model)
    swept = swept.checked(config)

    from cptool.bench.prefill import Sweep, measure

    sweep = Sweep(
        contexts=tuple(sorted(set(contexts))),
        miss_rates=tuple(sorted(set(miss_rates))),
        repeats=measuring.repeats,
        **swept.fields(config),
    )
    fields = measured(measure, sweep, swept.tp, measuring)
    if fields is None:
        return
    shown = title(model, config, sweep)
    emit(
        {**head(model, config, sweep, swept.tp), **fields},
        as_json=measuring.as_json,
        columns=_COLUMNS,
        row=_row,
        caption=caption(shown, sweep, _NOTE, fields["profile"]),
    )
    if measuring.plot:
        _draw(measuring.plot, fields["results"], shown)


_COLUMNS = (
    Column(name="N"),
    Column(name="context"),
    Column(name="new"),
    Column(name="variant", left=True),
    Column(name="time"),
    Column(name="predicted", rank=1),
    Column(name="ratio", rank=2),
    Column(name="regret", rank=3),
    Column(name="exposed", rank=4),
    Column(name="of ceiling", rank=5),
    Column(name="rate", rank=6),
    Column(name="sent", rank=7),
    Column(name="miss rate", rank=7),
    *SPREAD,
)
_NOTE = (
    "N: ranks. Ratio: predicted over measured. Exposed: time that ranks stood waiting for "
    "messages. Of ceiling: of a large matrix product's rate on each rank. Regret: what auto lost "
    "against the fastest."
)


def _row(r: dict[str, Any]) -> list[str]:
    return [
        str(r["ranks"]),
        f"{r['context']:,}",
        f"{r['tokens']:,}",
        asked(r),
        duration(r["ttft_seconds"]["median"]),
        duration(r["predicted_s"]),
        three(r["predicted_over_measured"]),
        percent(r.get("regret")),
        duration(r["exposed_seconds"]["median"]),
        percent(r["of_ceiling"]),
        flop_rate(r["flops"]),
        size(r["sent_bytes"]),
        percent(r["miss_rate"]),
        *spread(r["ttft_seconds"]),
    ]


def _draw(path: Path, results: list[dict[str, Any]], title: str) -> None:
    """Over the miss rate if there are several at one context, else over the context."""
    over_miss = len({r["context"] for r in results}) == 1
    x = "miss_rate" if over_miss else "context"
    several = not over_miss and len({r["miss_rate"] for r in results}) > 1

    def name(r: dict[str, Any]) -> str | None:
        rate = f", miss rate {r['miss_rate']:.3g}" * several
        return None if kind(r) is None else f"{kind(r)}{rate}"

    lines = curves(grouped(results, name), x, "ttft_seconds")
    plots.draw(
        path,
        lines,
        title=title,
        x="miss rate T / (T + P)" if over_miss else "context, tokens",
        y="time to the first token, s",
        logarithmic="xy",
        ticks=sorted({r[x] for r in results}),
    )
