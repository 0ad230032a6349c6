"""Draws the sweeps of `cptool plan`; needs matplotlib, which is loaded here alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cptool.errors import UserError

if TYPE_CHECKING:
    from cptool.cli.sweeps import Table


def draw(table: Table, path: Path, *, model: str, hardware: str) -> None:
    """A PNG (or what the suffix of `path` says) of a sweep.

    Raises UserError without matplotlib, or where the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            f"--plot {path}: matplotlib is not installed; pip install 'cptool[plot]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for number, (name, times) in enumerate(table.series.items()):
        points = [(x, t) for x, t in zip(table.x, times) if t is not None]
        if points:
            axes.plot(*zip(*points), marker="o", markersize=4, color=f"C{number}", label=name)
    for name, times in table.ideal.items():
        axes.plot(table.x, times, linestyle="--", color="0.5", label="perfect scaling")
    axes.set_xscale("log", base=10 if table.kind == "miss-rates" else 2)
    axes.set_yscale("log")
    axes.set_xticks(table.x, [_name(table.kind, x) for x in table.x], rotation=30)
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g} s"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel(table.axis)
    axes.set_ylabel("predicted time to the first token")
    axes.set_title(f"{model} on {hardware}: {table.title}", fontsize=10)
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=9)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: {error}; name a .png file that can be written") from None
    finally:
        pyplot.close(figure)


def _name(kind: str, x: float) -> str:
    if kind == "miss-rates":
        return f"{x:.3g}" if x < 0.01 else f"{100 * x:.3g}%"
    if kind == "ranks":
        return str(x)
    return f"{x / 1e6:.3g}M" if x >= 1e6 else f"{x / 1e3:.3g}K"
