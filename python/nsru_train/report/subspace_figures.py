"""Pictures of retain subspaces: spectrum, captured energy, editability, and adapter leakage."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from . import summary
from .canvas import new_figure, power_text, wide_enough
from .summary import Row, number
from .theme import LAYERS, LIGHT, method_colour, method_label


def spectrum(subspaces: Sequence[Row]) -> Figure:
    """Spectra of the retain activations with the chosen ranks; captured energy by layer."""
    kinds = _by_kind(subspaces)
    figure = new_figure(5.4)
    top, bottom = figure.subplots(
        2, len(kinds), sharey="row", squeeze=False, height_ratios=[1.25, 1]
    )
    last = max(layer for rows in kinds.values() for layer, _ in rows)
    for axes, (kind, rows) in zip(top, kinds.items(), strict=True):
        for layer, row in rows:
            shares = [max(number(share) or 0.0, 1e-12) for share in row.get("spectrum") or []]
            colour = LIGHT[_layer_colour(layer, last)]
            axes.plot(range(1, len(shares) + 1), shares, color=colour, lw=1.5)
            rank = row.get("rank")
            if shares and rank and rank <= len(shares):
                axes.plot(
                    rank, shares[rank - 1], "o", ms=5, color=colour, mec=LIGHT["surface"], zorder=5
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power_text(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(kind)
        axes.set_xlabel("direction i (log)")
    for axes, rows in zip(bottom, kinds.values(), strict=True):
        _by_layer(axes, rows, "captured_energy")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    wide_enough(bottom[0], 0.02)
    top[0].set_ylabel("share of energy\nλᵢ / trace (log)")
    bottom[0].set_ylabel("energy captured\n(certified lower bound)")
    _layer_legend(figure, last)
    return figure


def editability(subspaces: Sequence[Row]) -> Figure:
    """Share of forget activation energy that the projector leaves open; rank by layer."""
    kinds = _by_kind([row for row in subspaces if number(row.get("editability")) is not None])
    figure = new_figure(4.6)
    top, bottom = figure.subplots(
        2, len(kinds), sharey="row", squeeze=False, height_ratios=[1.3, 1]
    )
    last = max(layer for rows in kinds.values() for layer, _ in rows)
    for upper, lower, (kind, rows) in zip(top, bottom, kinds.items(), strict=True):
        _by_layer(upper, rows, "editability")
        _by_layer(lower, rows, "rank")
        upper.set_title(kind)
    smallest = min(row["editability"] for rows in kinds.values() for _, row in rows)
    if smallest > 0:
        top[0].set_yscale("log")
        top[0].set_ylim(10 ** math.floor(math.log10(smallest)), 1.15)
        for axes in top:
            axes.yaxis.set_minor_formatter(NullFormatter())
    top[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    top[0].set_ylabel("editability (log)\nforget energy left open")
    bottom[0].margins(y=0.12)
    bottom[0].set_ylim(bottom=0)
    bottom[0].set_ylabel("rank Q of the\nretain subspace")
    _layer_legend(figure, last)
    return figure


def leakage(rows: Sequence[Row]) -> Figure:
    """Leakage of every adapter into its retain subspace, one row a kind of linear."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        if number(row.get("leakage")) is not None:
            kinds.setdefault(str(row["module"]).rsplit(".", 1)[-1], []).append(row)
    methods = summary.method_names(
        [{"method": "nsru", **row} for group in kinds.values() for row in group]
    )
    figure = new_figure(1.5 + 0.33 * len(kinds))
    axes = figure.subplots()
    found = [row["leakage"] for group in kinds.values() for row in group if row["leakage"] > 0]
    lowest = min([*found, summary.LEAKAGE_TOLERANCE]) / 3
    for y, group in enumerate(kinds.values()):
        for row in group:
            colour = LIGHT[method_colour(row.get("method", "nsru"), methods)]
            x = max(row["leakage"], lowest)
            axes.plot(x, y, "o", ms=7, color=colour, alpha=0.75, mec=LIGHT["surface"], mew=0.8)
    axes.axvline(summary.LEAKAGE_TOLERANCE, color=LIGHT["muted"], lw=1.1, ls=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"fp32 tolerance {power_text(summary.LEAKAGE_TOLERANCE)}",
        (summary.LEAKAGE_TOLERANCE, 1),
        xycoords=("data", "axes fraction"),
        xytext=(5, 3),
        textcoords="offset points",
        color=LIGHT["ink-2"],
        fontsize=9,
    )
    axes.set_xscale("log")
    axes.set_xlim(lowest / 1.5, max([*found, summary.LEAKAGE_TOLERANCE]) * 4)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power_text(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(kinds)), list(kinds))
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("leakage ‖Ā U‖ / ‖A‖ (log; lower is better), one dot a module")
    if len(methods) > 1:
        handles = [
            Line2D(
                [],
                [],
                ls="",
                marker="o",
                color=LIGHT[method_colour(m, methods)],
                label=method_label(m),
            )
            for m in methods
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def _by_kind(subspaces: Sequence[Row]) -> dict[str, list[tuple[int, Row]]]:
    """Group inputs by what reads them ("q_proj k_proj v_proj"), each with its layer number."""
    kinds: dict[str, list[tuple[int, Row]]] = {}
    for row in subspaces:
        modules = [str(name) for name in row.get("modules") or [row["name"]]]
        kind = " · ".join(name.rsplit(".", 1)[-1] for name in modules)
        layer = re.search(r"\.(\d+)\.", modules[0])
        kinds.setdefault(kind, []).append((int(layer[1]) if layer else 0, row))
    if len(kinds) > 5:
        kinds = {"all inputs": [item for group in kinds.values() for item in group]}
    return {kind: sorted(group, key=lambda item: item[0]) for kind, group in kinds.items()}


def _layer_colour(layer: int, last: int) -> str:
    return LAYERS[round(layer / last * (len(LAYERS) - 1))] if last else LAYERS[4]


def _by_layer(axes: Axes, rows: Sequence[tuple[int, Row]], key: str) -> None:
    points = [
        (layer, row[key], row.get("rank_limited"))
        for layer, row in rows
        if number(row.get(key)) is not None
    ]
    last = max((layer for layer, _ in rows), default=0)
    axes.plot([p[0] for p in points], [p[1] for p in points], color=LIGHT["axis"], lw=1.2, zorder=2)
    for layer, value, limited in points:
        colour = LIGHT[_layer_colour(layer, last)]
        face = LIGHT["surface"] if limited else colour
        axes.plot(layer, value, "o", ms=7, mfc=face, mec=colour, mew=1.6, zorder=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    axes.set_xlim(-0.5, last + 0.5)
    axes.set_xlabel("layer")


def _layer_legend(figure: Figure, last: int) -> None:
    layers = sorted({0, last // 2, last})
    handles = [
        Line2D([], [], color=LIGHT[_layer_colour(layer, last)], lw=2.4, label=f"layer {layer}")
        for layer in layers
    ]
    dot: dict[str, Any] = {"ls": "", "marker": "o", "ms": 6, "color": LIGHT["ink-2"]}
    handles.append(Line2D([], [], **dot, label="chosen rank"))
    handles.append(
        Line2D([], [], **dot, mfc=LIGHT["surface"], mew=1.5, label="rank cut short by the width")
    )
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), columnspacing=2.0)
