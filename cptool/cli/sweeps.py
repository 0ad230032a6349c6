"""Tables of `cptool plan --sweep`: the time to the first token over contexts, ranks, miss rates."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from cptool.errors import UserError
from cptool.planning import planner
from cptool.planning.hardware import HardwareProfile
from cptool.units import duration
from cptool.variants import names

MISS_RATES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.125, 0.2, 0.35, 0.5, 0.75, 1.0)
TICKS = (0.01, 0.02, 0.03, 0.05, 0.08, 0.125, 0.2, 0.35, 0.5, 1.0)
SHORTEST = 8000


@dataclass(frozen=True)
class Table:
    """Seconds over `x`, one column for each of `series`; None where a rank's memory is too small.

    axis: what x is. ideal: name -> the seconds that a series would take if it scaled perfectly.
    notes: what the caller may want to know of it, one line each.
    """

    kind: str
    axis: str
    x: list[float]
    series: dict[str, list[float | None]]
    ideal: dict[str, list[float]]
    title: str
    notes: list[str]


def contexts(work, cp, tp, variant, profile: HardwareProfile, ranks: int) -> Table:
    """Contexts up to the one asked for, doubling, a series for each number of CP ranks."""
    tp = _tensor_parallel(work, cp, tp, variant, profile, ranks)
    counts = [cp] if cp else [c for c, _ in planner.layouts(work.config, None, tp, ranks)]
    lengths = [work.context]
    while lengths[-1] / 2 >= max(SHORTEST, work.cached + 1):
        lengths.append(lengths[-1] // 2)
    lengths.reverse()
    series = {
        f"CP{count} x TP{tp}": [
            _seconds(dataclasses.replace(work, context=n), count, tp, variant, profile)
            for n in lengths
        ]
        for count in counts
    }
    title = "time to the first token over the context"
    return Table("contexts", "context, tokens", lengths, series, {}, title, [])


def ranks(work, cp, tp, variant, profile: HardwareProfile, ranks: int) -> Table:
    """Numbers of CP ranks, beside what perfect scaling of the first would give."""
    tp = _tensor_parallel(work, cp, tp, variant, profile, ranks)
    counts = [c for c, _ in planner.layouts(work.config, None, tp, ranks)]
    times = [_seconds(work, count, tp, variant, profile) for count in counts]
    known = [(c, t) for c, t in zip(counts, times, strict=True) if t is not None]
    if not known:
        planner.best(planner.plan(work, c, tp, variant, profile) for c in counts)
    first, seconds = known[0]
    ideal = [seconds * first / count for count in counts]
    notes = [
        f"CP{count} reaches {seconds * first / count / spent:.0%} of perfect scaling"
        for count, spent in known[1:]
    ]
    title = f"time to the first token of {work.context:,} tokens over CP ranks"
    return Table(
        "ranks", f"CP ranks of TP{tp}", counts, {variant: times}, {variant: ideal}, title, notes
    )


def miss_rates(work, cp, tp, variant, profile: HardwareProfile, ranks: int) -> Table:
    """Miss rates T / (T + P) at one context, a series for each variant."""
    tp = _tensor_parallel(work, cp, tp, variant, profile, ranks)
    cp = cp or max(1, ranks // tp)
    if cp == 1:
        raise UserError(
            "--sweep miss-rates: one CP rank has no variants to compare; give --cp 2 or more, or "
            "raise --max-gpus"
        )
    compared = [variant] if variant != "auto" else names()
    rates = [m for m in MISS_RATES if round(m * work.context) >= 1]
    series = {
        name: [
            _seconds(
                dataclasses.replace(work, cached=work.context - round(m * work.context)),
                cp,
                tp,
                name,
                profile,
            )
            for m in rates
        ]
        for name in compared
    }
    notes = _fastest(rates, series) if variant == "auto" else []
    title = f"time to the first token of {work.context:,} tokens on CP{cp} x TP{tp}"
    return Table("miss-rates", "miss rate T / (T + P)", rates, series, {}, title, notes)


def _fastest(rates: list[float], series: dict[str, list[float | None]]) -> list[str]:
    """The fastest variant of each stretch of miss rates."""
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


SWEEPS: dict[str, Callable[..., Table]] = {
    "contexts": contexts,
    "ranks": ranks,
    "miss-rates": miss_rates,
}


def tell(table: Table, model: str, hardware: str, plot: Path | None, as_json: bool) -> None:
    """Prints a table, or its JSON."""
    if as_json:
        fields = {"model": model, "hardware": hardware, "sweep": table.kind, "axis": table.axis}
        fields |= {"x": table.x, "ttft_s": table.series, "ideal_s": table.ideal}
        click.echo(json.dumps({**fields, "plot": str(plot) if plot else None}))
        return
    from rich.console import Console
    from rich.table import Table as Grid

    grid = Grid(title=f"{model} on {hardware}: {table.title}", title_justify="left", box=None)
    grid.add_column(table.axis, justify="right")
    for name in table.series:
        grid.add_column(name, justify="right")
    for name in table.ideal:
        grid.add_column(f"{name}, perfect", justify="right")
    columns = [*table.series.values(), *table.ideal.values()]
    for x, *times in zip(table.x, *columns, strict=True):
        at = f"{x:.1%}" if table.kind == "miss-rates" else f"{x:,}"
        grid.add_row(at, *("no room" if t is None else duration(t) for t in times))
    Console(highlight=False).print(grid)
    for note in table.notes:
        click.echo(note)
    if plot is not None:
        click.echo(f"drawn in {plot}")


def draw_plot(table: Table, model: str, hardware: str, path: Path) -> None:
    """Seconds over x, both logarithmic; dashed is what would scale perfectly."""
    from cptool.cli import plot as plots

    scale = 100 if table.kind == "miss-rates" else 1
    lines = []
    for name, times in table.series.items():
        points = [(scale * x, t) for x, t in zip(table.x, times, strict=True) if t is not None]
        if points:
            lines.append(plots.Line(name, *zip(*points, strict=True)))
        if name in table.ideal:
            lines.append(plots.Line("perfect scaling", table.x, table.ideal[name], dashed=True))
    shown = TICKS if table.kind == "miss-rates" else table.x
    plots.draw(
        path,
        lines,
        title=f"{model} on {hardware}: {table.title}",
        x=table.axis + (", %" if scale == 100 else ""),
        y="predicted time to the first token, s",
        logarithmic="xy",
        ticks=[scale * x for x in shown],
    )


def _seconds(work, cp, tp, variant, profile) -> float | None:
    found = planner.plan(work, cp, tp, variant, profile)
    return None if found.excess_bytes else found.ttft.seconds


def _tensor_parallel(work, cp, tp, variant, profile, ranks) -> int:
    """What is asked for, else that of the fastest layout of so many ranks."""
    if tp:
        return tp
    pairs = planner.layouts(work.config, cp, None, ranks)
    return planner.best(planner.plan(work, c, t, variant, profile) for c, t in pairs).best.tp
