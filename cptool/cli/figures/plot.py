"""Line plots to a file, by matplotlib, which is optional and imported on demand."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cptool.errors import OptionError, UserError

FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a plot.

    band: lower and upper bounds of an area around `y`. dashed: for predictions.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    band: tuple[Sequence[float], Sequence[float]] | None = None


def check(path: Path | None) -> None:
    """Raise UserError if `path` could not be drawn to, before the work that it would show."""
    if path is None:
        return
    if path.suffix not in FORMATS:
        raise OptionError("plot", path, f"it must end in {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise OptionError("plot", path, f"{path.parent} is not a directory", "create it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "`plot`: matplotlib is not installed; install it with pip install 'cptool[plot]'"
        )


def draw(
    path: Path,
    lines: Sequence[Line],
    *,
    title: str,
    x: str,
    y: str,
    logarithmic: str = "",
    ticks: Sequence[float] | None = None,
) -> None:
    """Write the lines to `path`.

    logarithmic: the axes that are, "x", "y", "xy" or "". ticks: of the x axis, labelled in full.
    A dashed line takes the colour of the line before it; equal labels are shown once.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colour: Any = None
    named: set[str] = set()
    for line in lines:
        label = f"_{line.label}" if line.label in named else line.label
        named.add(line.label)
        if line.dashed:
            axes.plot(line.x, line.y, "--", color=colour, alpha=0.7, label=label)
            continue
        (drawn,) = axes.plot(line.x, line.y, "o-", markersize=4, label=label)
        colour = drawn.get_color()
        if line.band is not None:
            axes.fill_between(line.x, *line.band, color=colour, alpha=0.15, linewidth=0)
    if "x" in logarithmic:
        axes.set_xscale("log", base=2)
    if "y" in logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    if ticks is not None:
        axes.set_xticks(list(ticks), [f"{tick:,g}" for tick in ticks])
        axes.minorticks_off()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3, which="both" if "y" in logarithmic else "major")
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=150)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of a plot, and what stands beside its end. pale: whether its colour is weak."""

    label: str
    value: float
    note: str = ""
    pale: bool = False


def draw_bars(path: Path, bars: Sequence[Bar], *, title: str, x: str) -> None:
    """Write horizontal bars to `path`, the first one on top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.42 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for n, bar in enumerate(bars):
        axes.barh(n, bar.value, color="tab:blue", alpha=0.4 if bar.pale else 0.9)
        axes.text(bar.value, n, f" {bar.note}", va="center", fontsize="small")
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.invert_yaxis()
    axes.set_xlim(right=1.3 * max((bar.value for bar in bars), default=1.0))
    axes.set(title=title, xlabel=x)
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=150)
