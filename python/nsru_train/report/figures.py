"""Figures of a report: functions from rows of results.json and metrics.jsonl to matplotlib's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from . import summary
from .summary import FORGET_TARGET, LEAKAGE_TOLERANCE, PROBABILITIES, Curves, Row, number
from .theme import LIGHT, series_style

WIDTH = 10.0
MIN_PROBABILITY = 1e-6
LEAST_DAMAGE = 1e-4  # of a mean over some fifty questions; less is noise
LEVEL: dict[str, Any] = {"color": LIGHT["muted"], "lw": 1.1, "ls": (0, (4, 3)), "zorder": 1}


def frontier(results: Row, key: str, methods: Sequence[str]) -> Figure:
    """Forgetting against retention, every seed and the mean; damage at equal forgetting."""
    figure = Figure(figsize=(WIDTH, 4.9))
    left, right = figure.subplots(1, 2, width_ratios=[1.45, 1])
    points = [
        {**row, "forget_prob": max(row["forget_prob"], MIN_PROBABILITY)}
        for row in results["frontier"]
        if number(row.get("forget_prob")) is not None
    ]
    shown = summary.values(points, "forget_prob")
    for method, seeds in summary.runs(points, "forget_prob", key).items():
        style = series_style(method, methods)
        x, y = (
            summary.mean_curve(
                [(row["step"], row[name]) for row in rows] for rows in seeds.values()
            )
            for name in ("forget_prob", key)
        )
        paths = [[(row["forget_prob"], row[key]) for row in rows] for rows in seeds.values()]
        mean = [(forgotten, kept) for (_, forgotten), (_, kept) in zip(x, y, strict=True)]
        _seeds_and_mean(left, paths, mean, style, marker="o", ms=3.6)
        for end, (step, _) in zip(mean[-1:], x[-1:], strict=True):
            left.plot(*end, "o", ms=9, color=style["color"], mec=LIGHT["surface"], zorder=5)
            if len(methods) <= 2:  # more would lie on each other
                _note(left, f"step {step:g}", end, (-8, -3.5), style["color"], "right")
        for seed, rows in seeds.items():
            start = summary.before_value(results, key, seed)
            if start is not None:
                # What a point reached also holds for every milder demand, up to the next point.
                curve = zip(*summary.damage_curve(rows, start, key), strict=True)
                right.step(*curve, where="post", lw=1.3, alpha=0.6, **style)
    shown += _mark_before(left, results, key)
    matched = summary.matched_damage(results, key)
    for method in methods if matched else ():
        damage = summary.values(matched, f"{method}_damage")
        levels = [matched[0]["forget_prob"]] * len(damage)
        right.plot(levels, damage, "o", ms=5.5, color=series_style(method, methods)["color"])
    left.axvline(FORGET_TARGET, **LEVEL)
    right.axvline(matched[0]["forget_prob"] if matched else FORGET_TARGET, **LEVEL)
    right.axhline(0, color=LIGHT["axis"], lw=1)
    for axes in (left, right):
        _probability_axis(axes, "x", shown)
        _wide_enough(axes)
    left.set(
        title="The way taken, step by step (↖ better)",
        xlabel="probability of the forgotten answer (log; dashed: target)",
        ylabel=f"probability of {PROBABILITIES[key].lower()}\n(higher is better)",
    )
    right.set(
        title="Damage at equal forgetting",
        xlabel="forgotten answer at most this probable (log)",
        ylabel="probability lost (each seed; lower is better)",
    )
    _method_legend(figure, methods)
    return figure


def damage(results: Row, key: str, methods: Sequence[str]) -> Figure:
    """Damage at equal forgetting of many methods, a row each: without and with projection."""
    matched = summary.matched_damage(results, key)
    found = {m: summary.values(matched, f"{m}_damage") for m in methods}
    found = {m: [max(value, LEAST_DAMAGE) for value in lost] for m, lost in found.items()}
    figure, axes, bare = _by_method(found, lower_is_better=True)
    untrained = summary.untrained_damage(results, matched, key)
    for row, pair in bare.items():
        own = next((method for method in pair if method in untrained), None)
        lost = None if own is None else untrained[own]
        at = max(lost or 0.0, LEAST_DAMAGE)
        if lost is not None:
            axes.plot(at, row, "D", ms=7, color=LIGHT["muted"])
        why = "does not forget" if own is None else "trains nothing"
        _note(axes, why, (at, row), (8, -3.5), LIGHT["muted"], "left")
    axes.set(
        xscale="log",
        xlim=(0.8 * LEAST_DAMAGE, 1.4),
        xlabel=f"probability of {PROBABILITIES[key].lower()} lost (log; ← better)",
    )
    axes.xaxis.set_major_formatter("{x:g}")
    return figure


def utility(results: Row, methods: Sequence[str]) -> Figure:
    """Forgetting against model utility at the end of every run; the mean of a method is larger.

    Of many methods, a row each, the utility alone, of those that forget with every seed.
    """
    ends = summary.ends(results, "forget_prob", "model_utility")
    if len(methods) > summary.FEW_METHODS:
        able = [m for m in methods if all(p <= FORGET_TARGET for p, _ in ends[m])]
        kept = {m: [end for _, end in ends[m]] if m in able else [] for m in methods}
        figure, axes, bare = _by_method(kept, lower_is_better=False)
        for row in bare:
            text = f"forgotten answer above {FORGET_TARGET:g} with a seed"
            _note(axes, text, (0, row), (6, -3.5), LIGHT["muted"], "left")
        if (before := summary.before_value(results, "model_utility")) is not None:
            axes.axvline(before, **LEVEL)
        axes.set(xlabel="model utility at the end (→ better; dashed: before)", xlim=(-0.02, 1.02))
        return figure
    figure = Figure(figsize=(WIDTH, 4.9))
    axes = figure.subplots()
    shown = []
    for method in methods:
        colour = series_style(method, methods)["color"]
        left = [max(p, MIN_PROBABILITY) for p, _ in ends[method]]
        useful = [end for _, end in ends[method]]
        axes.plot(left, useful, "o", ms=4, alpha=0.5, color=colour)
        mean = fmean(left), fmean(useful)
        axes.plot(*mean, "o", ms=8, color=colour, mec=LIGHT["surface"], zorder=5)
        shown += left
    shown += _mark_before(axes, results, "model_utility")
    axes.axvline(FORGET_TARGET, **LEVEL)
    _probability_axis(axes, "x", shown)
    _wide_enough(axes, 0.1)
    axes.set(
        title="At the end of every run (↖ better)",
        xlabel="probability of the forgotten answer (log; dashed: target)",
        ylabel="model utility\n(higher is better)",
    )
    _method_legend(figure, methods)
    return figure


def _by_method(
    found: Mapping[str, Sequence[float]], lower_is_better: bool
) -> tuple[Figure, Axes, dict[int, tuple[str | None, str | None]]]:
    """A row for each method, without and with projection; the better mean places it, best on top.

    Returns:
        Also the rows without any value, with the names of their methods.
    """
    pairs = summary.projection_pairs([*found])
    sign = 1 if lower_is_better else -1

    def place(name: str) -> float:
        means = [sign * fmean(found[m]) for m in pairs[name] if m and found[m]]
        return min(means, default=math.inf)

    names = sorted(pairs, key=place, reverse=True)
    figure = Figure(figsize=(WIDTH, 1.2 + 0.36 * len(names)))
    axes = figure.subplots()
    styles = [series_style(which, ("projected", "plain")) for which in ("plain", "projected")]
    bare = {}
    for row, name in enumerate(names):
        means = []
        for method, style in zip(pairs[name], styles, strict=True):
            if values := found.get(method or ""):
                means.append(fmean(values))
                axes.plot(values, [row] * len(values), "o", ms=4, alpha=0.5, color=style["color"])
                axes.plot(means[-1], row, "o", ms=8, color=style["color"], mec=LIGHT["surface"])
        if len(means) == 2:
            axes.plot(means, [row, row], lw=1.4, color=LIGHT["axis"], zorder=0)
        if not means:
            bare[row] = pairs[name]
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_yticks(range(len(names)), [summary.label(name) for name in names])
    handles = [
        Line2D([], [], ls="", marker="o", ms=8, color=style["color"], label=text)
        for style, text in zip(styles, ("plain LoRA", "in the null space"), strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return figure, axes, bare


def steps(results: Row, methods: Sequence[str]) -> Figure:
    """Answer probabilities over the steps, with the base model's as dashed lines."""
    base = {title: summary.before_value(results, key) for key, title in PROBABILITIES.items()}
    figure = _over_steps(summary.curves(results["frontier"], PROBABILITIES), methods, 3, base)
    for axes in figure.axes:
        axes.set_ylabel("probability")
        if axes.get_title("left") == PROBABILITIES["forget_prob"]:
            shown = summary.values(results["frontier"], "forget_prob")
            axes.set_title(axes.get_title("left") + " (log)")
            _probability_axis(axes, "y", shown)
        _wide_enough(axes)
    return figure


def losses(curves: Curves, methods: Sequence[str]) -> Figure:
    """The objective and its parts over the steps."""
    figure = _over_steps(curves, methods, 5, {})
    figure.axes[0].set_ylabel("loss")
    return figure


def _over_steps(
    curves: Curves, methods: Sequence[str], wide: int, levels: Mapping[str, float | None]
) -> Figure:
    """One chart for each title, ``wide`` in a row: every seed thin, the mean thick."""
    methods = methods or ["train"]
    rows = math.ceil(len(curves) / wide)
    figure = Figure(figsize=(WIDTH, 0.5 + 2.5 * rows))
    for place, (title, runs) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, min(wide, len(curves)), place + 1)
        for method in dict.fromkeys(method for method, _ in runs):
            seeds = [points for (owner, _), points in runs.items() if owner == method]
            style = series_style(method, methods)
            _seeds_and_mean(axes, seeds, summary.mean_curve(seeds), style)
        level = levels.get(title)
        if level is not None:
            axes.axhline(level, **LEVEL)
        axes.set(title=title, xlabel="optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    _method_legend(figure, methods)
    return figure


def spectrum(subspaces: Sequence[Row]) -> Figure:
    """Spectra of the retain activations with the chosen ranks; captured energy by layer."""
    figure, top, bottom, kinds, last = _kind_grid(subspaces, 5.4)
    for upper, lower, rows in zip(top, bottom, kinds, strict=True):
        for layer, row in rows:
            shares = [max(number(share) or 0.0, 1e-12) for share in row.get("spectrum") or []]
            shade, rank = _layer_shade(layer, last), row.get("rank")
            upper.plot(range(1, len(shares) + 1), shares, lw=1.5, **shade)
            if rank and 0 < rank <= len(shares):
                upper.plot(rank, shares[rank - 1], "o", ms=5, **shade)
        upper.set(xlabel="direction i (log)", xscale="log", yscale="log")
        for axis in (upper.xaxis, upper.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        _by_layer(lower, rows, "captured_energy", last)
        lower.yaxis.set_major_formatter(PercentFormatter(1))
    _wide_enough(bottom[0])
    top[0].set_ylabel("share of energy\nλᵢ / trace (log)")
    bottom[0].set_ylabel("energy captured\n(certified lower bound)")
    return figure


def editability(subspaces: Sequence[Row]) -> Figure:
    """Share of forget activation energy that the projector leaves open; rank by layer."""
    found = [row for row in subspaces if number(row.get("editability")) is not None]
    figure, top, bottom, kinds, last = _kind_grid(found, 4.6)
    smallest = min(row["editability"] for row in found)
    for upper, lower, rows in zip(top, bottom, kinds, strict=True):
        _by_layer(upper, rows, "editability", last)
        _by_layer(lower, rows, "rank", last)
        if smallest > 0:
            upper.set(yscale="log", ylim=(10 ** math.floor(math.log10(smallest)), 1.15))
        upper.yaxis.set_minor_formatter(NullFormatter())
        upper.yaxis.set_major_formatter(PercentFormatter(1))
    top[0].set_ylabel("editability (log)\nforget energy left open")
    bottom[0].set_ylim(bottom=0)
    bottom[0].set_ylabel("rank Q of the\nretain subspace")
    return figure


def leakage(rows: Sequence[Row], methods: Sequence[str]) -> Figure:
    """Leakage of every adapter into its retain subspace, one line of dots a kind of linear."""
    found = [row for row in rows if number(row.get("leakage")) is not None]
    kinds = list(dict.fromkeys(summary.kind(row.get("module")) for row in found))
    sizes = [row["leakage"] for row in found if row["leakage"] > 0] + [LEAKAGE_TOLERANCE]
    figure = Figure(figsize=(WIDTH, 1.5 + 0.33 * len(kinds)))
    axes = figure.subplots()
    for row in found:
        x, y = max(row["leakage"], min(sizes) / 3), kinds.index(summary.kind(row.get("module")))
        colour = series_style(str(row.get("method")), methods)["color"]
        axes.plot(x, y, "o", ms=7, color=colour, alpha=0.75)
    axes.axvline(LEAKAGE_TOLERANCE, **LEVEL)
    axes.set(xscale="log", xlim=(min(sizes) / 5, max(sizes) * 4), ylim=(len(kinds) - 0.5, -0.5))
    axes.set_xlabel("leakage ‖Ā U‖ / ‖A‖ (log; lower is better; dashed: tolerance in fp32)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(kinds)), kinds)
    axes.grid(axis="y", visible=False)
    if any(row.get("method") for row in found):
        _method_legend(figure, methods)
    return figure


def _seeds_and_mean(axes: Axes, seeds, mean, style, **marker) -> None:
    for points in seeds if len(seeds) > 1 else ():
        axes.plot(*zip(*points, strict=True), lw=0.9, alpha=0.4, zorder=2, **style)
    if mean:
        axes.plot(*zip(*mean, strict=True), lw=2.2, mec=LIGHT["surface"], **style, **marker)


def _note(axes: Axes, text: str, at, offset, colour: str, side: str) -> None:
    axes.annotate(
        text, at, xytext=offset, textcoords="offset points", ha=side, color=colour, zorder=7
    )


def _mark_before(axes: Axes, results: Row, key: str) -> list[float]:
    """Mark the base model's forget probability and ``key``; the first of them, where both are."""
    x, y = (summary.before_value(results, name) for name in ("forget_prob", key))
    if x is None or y is None:
        return []
    axes.plot(x, y, "D", ms=7.5, mfc=LIGHT["surface"], mec=LIGHT["ink"], mew=1.6, zorder=6)
    _note(axes, "before", (x, y), (0, 9), LIGHT["ink"], "center")
    return [x]


def _probability_axis(axes: Axes, which: str, found: Sequence[float]) -> None:
    lowest = max(min(found), MIN_PROBABILITY)
    axes.set(**{f"{which}scale": "log", f"{which}lim": (0.76 * lowest**1.12, 1.35)})
    axis = getattr(axes, f"{which}axis")
    if lowest > 0.005:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _wide_enough(axes: Axes, span: float = 0.02) -> None:
    """Keep differences far below ``span`` from filling the whole axis."""
    low, high = axes.get_ylim()
    if high - low < span:
        axes.set_ylim((low + high - span) / 2, (low + high + span) / 2)


def _method_legend(figure: Figure, methods: Sequence[str]) -> None:
    handles = [
        Line2D([], [], lw=2.6, label=summary.label(method), **series_style(method, methods))
        for method in methods
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)))


def _kind_grid(subspaces: Sequence[Row], height: float):
    """A column of two charts for each kind of input, such as "q_proj · k_proj", and its rows.

    Returns:
        figure, upper axes, lower axes, [(layer, row)] of each kind, and the last layer.
    """
    kinds: dict[str, list[tuple[int, Row]]] = {}
    for row in subspaces:
        modules = [str(name) for name in row.get("modules") or [row.get("name")]]
        layer = re.search(r"\.(\d+)\.", modules[0])
        kind = " · ".join(map(summary.kind, modules))
        kinds.setdefault(kind, []).append((int(layer[1]) if layer else 0, row))
    if len(kinds) > 5:
        kinds = {"all inputs": [item for group in kinds.values() for item in group]}
    groups = [sorted(group, key=lambda item: item[0]) for group in kinds.values()]
    last = max(layer for group in groups for layer, _ in group)
    figure = Figure(figsize=(WIDTH, height))
    top, bottom = figure.subplots(2, len(kinds), sharey="row", squeeze=False, height_ratios=[5, 4])
    for axes, kind in zip(top, kinds, strict=True):
        axes.set_title(kind)
    handles = [
        Line2D([], [], lw=2.4, label=f"layer {layer}", **_layer_shade(layer, last))
        for layer in sorted({0, last // 2, last})
    ]
    dot: dict[str, Any] = {"ls": "", "marker": "o", "color": LIGHT["ink-2"]}
    handles.append(Line2D([], [], label="chosen rank", **dot))
    handles.append(Line2D([], [], label="cut short by the width", mfc=LIGHT["surface"], **dot))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure, top, bottom, groups, last


def _layer_shade(layer: int, last: int) -> dict[str, Any]:
    """Early layers pale, late ones strong, in light and dark alike."""
    return {"color": LIGHT["series-5"], "alpha": 0.3 + 0.7 * layer / last if last else 1.0}


def _by_layer(axes: Axes, rows: Sequence[tuple[int, Row]], key: str, last: int) -> None:
    found = [(layer, row) for layer, row in rows if number(row.get(key)) is not None]
    axes.plot([x for x, _ in found], [row[key] for _, row in found], color=LIGHT["axis"], lw=1.2)
    for layer, row in found:
        shade = _layer_shade(layer, last)
        face = LIGHT["surface"] if row.get("rank_limited") else shade["color"]
        axes.plot(layer, row[key], "o", ms=7, mfc=face, mew=1.6, **shade)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    axes.set(xlim=(-0.5, last + 0.5), xlabel="layer")
