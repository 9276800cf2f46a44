"""One palette for figures and page, light and dark, and the SVG of a figure for the page.

Figures are drawn in the light colours. In the page their SVG names CSS variables instead and so
follows the reader's light or dark setting; the PNG files keep the light colours.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from nsru_kernels.files import atomic_write

COLOURS: dict[str, tuple[str, str]] = {  # name -> light, dark
    "surface": ("#fdfdfc", "#191a1c"),
    "ink": ("#16181b", "#f2f2ef"),
    "ink-2": ("#50545a", "#c0c2c4"),
    "muted": ("#73777d", "#93979c"),
    "axis": ("#b9bcc0", "#4a4d52"),
    "grid": ("#e6e7e8", "#2b2d30"),
    "good": ("#157a3c", "#4fc07d"),
    "bad": ("#c22f3d", "#f0707b"),
    "series-0": ("#1f6fd0", "#4a98f0"),
    "series-1": ("#dd5f24", "#f0793f"),
    "series-2": ("#12875c", "#35b886"),
    "series-3": ("#8b4bb8", "#b98be0"),
    "series-4": ("#a8801a", "#d5ab45"),
    "series-5": ("#0f8291", "#45bccb"),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
_SERIES = [name for name in COLOURS if name.startswith("series")]
_RC: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": LIGHT["axis"],
    "axes.facecolor": LIGHT["surface"],
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.labelcolor": LIGHT["ink-2"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.facecolor": LIGHT["surface"],
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": LIGHT["grid"],
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "nsru",
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # names of modules and methods may hold dollar signs
    "xtick.color": LIGHT["axis"],
    "xtick.labelcolor": LIGHT["ink-2"],
    "ytick.color": LIGHT["axis"],
    "ytick.labelcolor": LIGHT["ink-2"],
}


def series_style(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour of a method's lines by its place among ``names``; dashed where the colours repeat."""
    place = names.index(name) if name in names else 0
    dashes = ("-", "--", ":")[place // len(_SERIES) % 3]
    return {"color": LIGHT[_SERIES[place % len(_SERIES)]], "linestyle": dashes}


def draw(folder: Path, name: str, plot: Callable[..., Figure], *data: Any) -> str:
    """Save ``plot(*data)`` as ``folder/name.png`` and return its SVG for the page."""
    png, svg = io.BytesIO(), io.StringIO()
    with matplotlib.rc_context(_RC):
        figure = plot(*data)
        figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
        figure.set_layout_engine("none")  # what the first drawing laid out stays
        figure.savefig(svg, format="svg", metadata={"Date": None})
    atomic_write(folder / f"{name}.png", png.getvalue())
    return themed_svg(svg.getvalue(), name)


def themed_svg(svg: str, prefix: str) -> str:
    """Make matplotlib's SVG embeddable: scalable, ids unique in the page, colours as variables."""
    names = {light: name for name, light in LIGHT.items()}
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    return re.sub(
        r"#[0-9a-f]{6}\b", lambda m: f"var(--{names[m[0]]})" if m[0] in names else m[0], svg
    )
