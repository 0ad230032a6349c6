"""Tables of `cptool plan --sweep`: the time to the first token over contexts, ranks, miss rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from cptool import variants
from cptool.cli.figures import plot as plots
from cptool.cli.figures import tables
from cptool.cli.figures.tables import Column
from cptool.cli.json_output import print_object
from cptool.cli.plan.search import Search
from cptool.errors import UserError
from cptool.planning import planner
from cptool.units import duration

MISS_RATES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.125, 0.2, 0.35, 0.5, 0.75, 1.0)
TICKS = (0.01, 0.02, 0.03, 0.05, 0.08, 0.125, 0.2, 0.35, 0.5, 1.0)
SHORTEST = 8000


@dataclass(frozen=True, kw_only=True)
class Table:
    """Seconds over `x`, one column for each of `series`; None where a rank's memory is too small.

    axis: what x is. ideal: name -> the seconds that a series would take if it scaled perfectly.
    notes: lines to print below the table.
    """

    kind: str
    axis: str
    x: Sequence[float]
    series: dict[str, list[float | None]]
    title: str
    ideal: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def contexts(search: Search) -> Table:
    """Return contexts that double up to the requested one, with a series per number of CP ranks."""
    tp = search.tensor_parallel()
    counts = [search.cp] if search.cp else search.cp_counts(tp)
    lengths = [search.work.context]
    while lengths[-1] / 2 >= max(SHORTEST, search.work.cached + 1):
        lengths.append(lengths[-1] // 2)
    lengths.reverse()
    series = {
        f"CP{count} x TP{tp}": [
            search.seconds(count, tp, work=search.with_work(context=n)) for n in lengths
        ]
        for count in counts
    }
    return Table(
        kind="contexts",
        axis="context, tokens",
        x=lengths,
        series=series,
        title="time to the first token over the context",
    )


def ranks(search: Search) -> Table:
    """Return the numbers of CP ranks, beside what perfect scaling of the first would give."""
    tp = search.tensor_parallel()
    counts = search.cp_counts(tp)
    times = [search.seconds(count, tp) for count in counts]
    known = [(c, t) for c, t in zip(counts, times, strict=True) if t is not None]
    if not known:
        planner.best(search.plan(c, tp) for c in counts)  # raises, and says what is missing
    first, seconds = known[0]
    return Table(
        kind="ranks",
        axis=f"CP ranks of TP{tp}",
        x=counts,
        series={search.variant: times},
        title=f"time to the first token of {search.work.context:,} tokens over CP ranks",
        ideal={search.variant: [seconds * first / count for count in counts]},
        notes=[
            f"CP{count} reaches {seconds * first / count / spent:.0%} of perfect scaling"
            for count, spent in known[1:]
        ],
    )


def miss_rates(search: Search) -> Table:
    """Return miss rates T / (T + P) at one context, with a series for each variant."""
    tp, context = search.tensor_parallel(), search.work.context
    cp = search.cp or max(1, search.ranks // tp)
    if cp == 1:
        raise UserError(
            "--sweep miss-rates: one CP rank has no variants to compare; give --cp 2 or more, or "
            "raise --max-gpus"
        )
    compared = [search.variant] if search.variant != "auto" else variants.names()
    rates = [m for m in MISS_RATES if round(m * context) >= 1]
    works = [search.with_work(cached=context - round(m * context)) for m in rates]
    series = {
        name: [search.seconds(cp, tp, work=work, variant=name) for work in works]
        for name in compared
    }
    return Table(
        kind="miss-rates",
        axis="miss rate T / (T + P)",
        x=rates,
        series=series,
        title=f"time to the first token of {context:,} tokens on CP{cp} x TP{tp}",
        notes=_fastest(rates, series) if search.variant == "auto" else [],
    )


def _fastest(rates: list[float], series: dict[str, list[float | None]]) -> list[str]:
    """Return the fastest variant of each stretch of miss rates."""
    stretches: list[tuple[str, list[float]]] = []
    for rate, *times in zip(rates, *series.values(), strict=True):
        fitting = [(t, name) for t, name in zip(times, series, strict=True) if t is not None]
        if not fitting:
            continue
        name = min(fitting)[1]
        if not stretches or stretches[-1][0] != name:
            stretches.append((name, []))
        stretches[-1][1].append(rate)
    return [f"{name} is fastest from {on[0]:.1%} to {on[-1]:.1%}" for name, on in stretches]


SWEEPS: dict[str, Callable[[Search], Table]] = {
    "contexts": contexts,
    "ranks": ranks,
    "miss-rates": miss_rates,
}


def show(table: Table, search: Search, plot: Path | None, as_json: bool) -> None:
    """Print a table, or its JSON."""
    if as_json:
        fields = {
            "model": search.model,
            "hardware": search.profile.name,
            "sweep": table.kind,
            "axis": table.axis,
            "x": list(table.x),
            "ttft_s": table.series,
            "ideal_s": table.ideal,
            "plot": str(plot) if plot else None,
        }
        print_object(fields)
        return
    columns: list[Sequence[float | None]] = [*table.series.values(), *table.ideal.values()]
    rows = []
    for row, x in enumerate(table.x):
        at = f"{x:.1%}" if table.kind == "miss-rates" else f"{x:,}"
        times = [column[row] for column in columns]
        rows.append((at, *("no room" if t is None else duration(t) for t in times)))
    names = [table.axis, *table.series, *(f"{name}, perfect" for name in table.ideal)]
    heads = [Column(name=name) for name in names]
    tables.show(heads, rows, title=_title(table, search))
    for note in table.notes:
        click.echo(note)
    if plot is not None:
        click.echo(f"drawn in {plot}")


def draw_plot(table: Table, search: Search, path: Path) -> None:
    """Draw seconds over x, both logarithmic; perfect scaling is dashed."""
    scale = 100 if table.kind == "miss-rates" else 1
    lines = []
    for name, times in table.series.items():
        points = [(scale * x, t) for x, t in zip(table.x, times, strict=True) if t is not None]
        if points:
            x, y = zip(*points, strict=True)
            lines.append(plots.Line(label=name, x=x, y=y))
        if name in table.ideal:
            perfect = table.ideal[name]
            lines.append(plots.Line(label="perfect scaling", x=table.x, y=perfect, dashed=True))
    shown = TICKS if table.kind == "miss-rates" else table.x
    plots.draw(
        path,
        lines,
        title=_title(table, search),
        x=table.axis + (", %" if scale == 100 else ""),
        y="predicted time to the first token, s",
        logarithmic="xy",
        ticks=[scale * x for x in shown],
    )


def _title(table: Table, search: Search) -> str:
    return f"{search.model} on {search.profile.name}: {table.title}"
