"""What all pictures share: canvas, log axes of probabilities, notes, and saving as PNG and SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nsru_kernels.files import atomic_write

from .summary import Row
from .theme import LIGHT, RC, themed_svg

WIDTH = 10.0
MIN_PROBABILITY = 1e-6


@dataclass(frozen=True)
class Picture:
    """One figure: the PNG on disk and the SVG that the page embeds."""

    name: str
    title: str
    caption: str
    path: Path
    svg: str


def draw(
    name: str, title: str, caption: str, plot: Callable[..., Figure], *args: Any, folder: Path
) -> Picture:
    """Draw ``plot(*args)``, save ``folder/name.png`` and keep the embeddable SVG beside it."""
    with matplotlib.rc_context(RC):
        figure = plot(*args)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None})
    path = atomic_write(folder / f"{name}.png", png.getvalue())
    return Picture(name, title, caption, path, themed_svg(svg.getvalue(), name))


def new_figure(height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.04)
    return Figure(figsize=(WIDTH, height), layout=layout)


def columns(rows: Sequence[Row], keys: Sequence[str]) -> list[list[float]]:
    return [
        [max(row[key], MIN_PROBABILITY) if key == "forget_prob" else row[key] for row in rows]
        for key in keys
    ]


def probability_log_axis(axes: Axes, found: Sequence[float], which: str = "x") -> None:
    lowest = max(min(found), MIN_PROBABILITY)
    limits = (10 ** (math.log10(lowest) * 1.12 - 0.12), 1.35)
    axis = axes.xaxis if which == "x" else axes.yaxis
    if which == "x":
        axes.set_xscale("log")
        axes.set_xlim(limits)
    else:
        axes.set_yscale("log")
        axes.set_ylim(limits)
    if lowest > 0.005:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: probability_text(value)))
    axis.set_minor_formatter(NullFormatter())


def wide_enough(axes: Axes, span: float) -> None:
    """Keep differences far below ``span`` from filling the whole axis."""
    low, high = axes.get_ylim()
    if high - low < span:
        middle = (low + high) / 2
        axes.set_ylim(middle - span / 2, middle + span / 2)


def note(
    axes: Axes,
    at: tuple[float, float],
    text: str,
    offset: tuple[float, float],
    colour: str,
    ha: str = "center",
) -> None:
    axes.annotate(
        text,
        at,
        xytext=offset,
        textcoords="offset points",
        ha=ha,
        color=LIGHT[colour],
        fontsize=9,
        zorder=7,
    )


def mark_level(axes: Axes, x: float, text: str, at: float) -> None:
    """A dashed vertical line, named at the bottom (0) or the top (1) of the axes."""
    axes.axvline(x, color=LIGHT["muted"], lw=1, ls=(0, (4, 3)), zorder=1)
    axes.annotate(
        text,
        (x, at),
        xycoords=("data", "axes fraction"),
        xytext=(5, -2 if at else 4),
        textcoords="offset points",
        va="top" if at else "bottom",
        color=LIGHT["ink-2"],
        fontsize=9,
    )


def probability_text(value: float) -> str:
    return f"{value:g}" if value >= 1e-3 else power_text(value)


def power_text(value: float) -> str:
    exponent = round(math.log10(value)) if value > 0 else 0
    if value <= 0 or not math.isclose(value, 10.0**exponent, rel_tol=1e-6):
        return f"{value:.2g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
