"""One palette for pictures and page, in a light and a dark variant.

Pictures are drawn in the light colours. In the page their SVG refers to the CSS variables of the
same names and follows the reader's light or dark setting; the PNG files keep the light colours.
"""

from __future__ import annotations

import re

COLOURS: dict[str, tuple[str, str]] = {
    "surface": ("#fdfdfc", "#191a1c"),
    "ink": ("#16181b", "#f2f2ef"),
    "ink-2": ("#50545a", "#c0c2c4"),
    "muted": ("#73777d", "#93979c"),
    "axis": ("#b9bcc0", "#4a4d52"),
    "grid": ("#e6e7e8", "#2b2d30"),
    "before": ("#6b6f76", "#a9adb2"),
    "nsru": ("#1f6fd0", "#4a98f0"),
    "lora": ("#dd5f24", "#f0793f"),
    "other-0": ("#12875c", "#35b886"),
    "other-1": ("#8b4bb8", "#b98be0"),
    "other-2": ("#a8801a", "#d5ab45"),
    "good": ("#157a3c", "#4fc07d"),
    "bad": ("#c22f3d", "#f0707b"),
}
# First layer to last layer: away from the surface in both settings.
LAYERS = [f"layer-{i}" for i in range(8)]
_RAMP = [
    ("#a9c9c4", "#2f5f5d"),
    ("#8ab9b3", "#3a7471"),
    ("#6ba8a1", "#478a86"),
    ("#4d968f", "#58a09a"),
    ("#34837d", "#6fb5ae"),
    ("#206f6b", "#8ac9c2"),
    ("#115a58", "#a9dcd6"),
    ("#064544", "#cbeeea"),
]
COLOURS |= dict(zip(LAYERS, _RAMP, strict=True))

LIGHT = {name: light for name, (light, _) in COLOURS.items()}

METHOD_LABELS = {
    "before": "Before",
    "nsru": "NSRU",
    "lora": "LoRA without projection",
    "train": "Training",
    "after": "After",
}

RC = {
    "figure.facecolor": LIGHT["surface"],
    "savefig.facecolor": LIGHT["surface"],
    "axes.facecolor": LIGHT["surface"],
    "axes.edgecolor": LIGHT["axis"],
    "axes.linewidth": 0.8,
    "axes.labelcolor": LIGHT["ink-2"],
    "axes.labelsize": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": LIGHT["axis"],
    "ytick.color": LIGHT["axis"],
    "xtick.labelcolor": LIGHT["ink-2"],
    "ytick.labelcolor": LIGHT["ink-2"],
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
    "text.color": LIGHT["ink"],
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 1.6,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "nsru",
}


def method_colour(method: str, others: list[str] | None = None) -> str:
    """Colour name of a method; methods beyond the known ones take the spare colours in order."""
    if method in ("before", "nsru", "lora"):
        return method
    if method == "train":
        return "nsru"
    return f"other-{(others or [method]).index(method) % 3}"


def method_label(method: str) -> str:
    """Name of a method as pictures and tables show it."""
    return METHOD_LABELS.get(method, method)


def css_variables() -> str:
    """The palette as CSS: light by default, dark where the reader asks for it."""

    def block(index: int) -> str:
        return "".join(f"--{name}:{pair[index]};" for name, pair in COLOURS.items())

    return (
        f":root{{color-scheme:light dark;{block(0)}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{block(1)}}}}}\n"
    )


_NAME_OF = {light: name for name, light in LIGHT.items()}


def themed_svg(svg: str, prefix: str) -> str:
    """Make matplotlib's SVG embeddable: scalable, ids unique in the page, colours as variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    return re.sub(
        r"#[0-9a-f]{6}\b",
        lambda match: f"var(--{_NAME_OF[match[0]]})" if match[0] in _NAME_OF else match[0],
        svg,
    )
