"""Pictures of unlearning: functions from rows of results.json to a matplotlib figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from . import summary
from .canvas import (
    MIN_PROBABILITY,
    columns,
    mark_level,
    new_figure,
    note,
    probability_log_axis,
    wide_enough,
)
from .summary import Row, Trajectory, number
from .theme import LIGHT, method_colour, method_label


def frontier(results: Row, retain_key: str = "retain_unseen_prob") -> Figure:
    """Forgetting against retention, every seed and the mean; damage at equal forgetting."""
    keys, name = ("forget_prob", retain_key), summary.RETAIN_NAMES[retain_key]
    runs = summary.trajectories(results["frontier"], keys)
    figure = new_figure(4.9)
    left, right = figure.subplots(1, 2, width_ratios=[1.45, 1])
    before = [
        row
        for row in summary.of_method(results.get("methods") or [], "before")
        if all(number(row.get(key)) is not None for key in keys)
    ]
    for run in runs:
        _trajectory(left, run, keys)
    if before:
        x, y = (fmean(row[key] for row in before) for key in keys)
        left.plot(x, y, "D", ms=7.5, mfc=LIGHT["surface"], mec=LIGHT["ink"], mew=1.6, zorder=6)
        note(left, (x, y), "before", (0, 9), "ink")
    probability_log_axis(left, summary.values([*results["frontier"], *before], "forget_prob"))
    left.margins(y=0.1)
    wide_enough(left, 0.02)
    left.set_title("The way taken, step by step")
    left.set_xlabel("probability of the forgotten answer (log; lower is better)")
    left.set_ylabel(f"probability of {name}\n(higher is better)")
    mark_level(left, summary.FORGET_TARGET, f"target ≤ {summary.FORGET_TARGET:g}", at=0.0)
    left.annotate(
        "↖ better", (0.015, 0.985), xycoords="axes fraction", color=LIGHT["muted"], va="top"
    )

    _damage(right, results, runs, retain_key)
    _method_legend(figure, runs)
    return figure


def _trajectory(axes: Axes, run: Trajectory, keys: Sequence[str]) -> None:
    colour = LIGHT[method_colour(run.method)]
    several = len(run.seeds) > 1
    for rows in run.seeds.values() if several else ():
        axes.plot(*columns(rows, keys), color=colour, lw=1, alpha=0.4, zorder=2)
    if not run.mean:
        return
    x, y = columns(run.mean, keys)
    axes.plot(
        x, y, color=colour, lw=2.4, zorder=4, marker="o", ms=3.6, mec=LIGHT["surface"], mew=0.5
    )
    axes.plot(x[-1], y[-1], "o", ms=9, color=colour, mec=LIGHT["surface"], mew=1.6, zorder=5)
    for i in _arrow_positions(x):
        axes.annotate(
            "",
            (x[i + 1], y[i + 1]),
            (x[i], y[i]),
            arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 0, "mutation_scale": 15},
            zorder=4,
        )
    label = f"step {run.mean[-1]['step']:g}"
    note(axes, (x[-1], y[-1]), label, (-8, -3.5), method_colour(run.method), ha="right")


def _arrow_positions(x: Sequence[float]) -> list[int]:
    """Segments nearest to a quarter, a half and three quarters of the way along the log axis."""
    logs = [math.log10(max(value, MIN_PROBABILITY)) for value in x]
    total = logs[-1] - logs[0] if len(logs) > 1 else 0.0
    if not total:
        return []
    middles = [(a + b) / 2 for a, b in pairwise(logs)]
    goals = [logs[0] + share * total for share in (0.25, 0.5, 0.75)]
    return sorted(
        {min(range(len(middles)), key=lambda i: abs(middles[i] - goal)) for goal in goals}
    )


def _damage(axes: Axes, results: Row, runs: Sequence[Trajectory], retain_key: str) -> None:
    """Least damage to the retain answers as a function of the forgetting asked for."""
    shown = []
    for run in runs:
        colour = LIGHT[method_colour(run.method)]
        for seed, rows in run.seeds.items():
            before = summary.before_value(results, retain_key, seed)
            if before is None:
                continue
            curve = summary.damage_curve(rows, before, retain_key)
            x, y = [p for p, _ in curve], [d for _, d in curve]
            shown += x
            # What a point reached also holds for every milder demand, up to the next point.
            axes.step(x, y, where="post", color=colour, lw=1.3, alpha=0.55)
    matched = summary.matched_rows(results, retain_key)
    if matched:
        level = matched[0]["forget_prob"]
        mark_level(axes, level, f"compared at {level:.2g}", at=1.0)
        for method in ("nsru", "lora"):
            damage = [row[f"{method}_damage"] for row in matched]
            colour = LIGHT[method_colour(method)]
            axes.plot(
                [level] * len(damage),
                damage,
                "o",
                ms=5.5,
                color=colour,
                mec=LIGHT["surface"],
                zorder=5,
            )
    axes.axhline(0, color=LIGHT["axis"], lw=1)
    probability_log_axis(axes, shown or [1.0])
    wide_enough(axes, 0.02)
    axes.set_title("Damage at equal forgetting")
    axes.set_xlabel("forgotten answer at most this probable (log)")
    axes.set_ylabel(
        f"probability lost on {summary.RETAIN_NAMES[retain_key]}\n(each seed; lower is better)"
    )


def steps(results: Row) -> Figure:
    """Forgotten, safe and retain answers over the steps, every seed and the mean."""
    titles = {
        "forget_prob": "Forgotten answer (log)",
        "safe_prob": "Safe answer",
        "retain_prob": "Retain answers trained on",
        "retain_unseen_prob": "Unseen retain answers",
        "retain_untouched_prob": "Untouched retain answers",
    }
    points = results["frontier"]
    panels = {key: title for key, title in titles.items() if summary.values(points, key)}
    wide = 2 if len(panels) in (1, 2, 4) else 3
    rows = math.ceil(len(panels) / wide)
    figure = new_figure(0.5 + 2.55 * rows)
    grid = list(figure.subplots(rows, wide, squeeze=False).flat)
    runs: list[Trajectory] = []
    for axes, (key, title) in zip(grid, panels.items(), strict=False):
        runs = summary.trajectories(points, [key])
        for run in runs:
            _seeds_and_mean(axes, run, key)
        before = summary.before_value(results, key)
        if before is not None:
            axes.axhline(before, color=LIGHT["before"], lw=1.1, ls=(0, (4, 3)), zorder=1)
        axes.set_title(title)
        if key == "forget_prob":
            probability_log_axis(axes, summary.values(points, key), which="y")
        else:
            wide_enough(axes, 0.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.set_xlabel("optimizer step")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[::wide]:
        axes.set_ylabel("probability")
    dashed = Line2D(
        [], [], color=LIGHT["before"], lw=1.1, ls=(0, (4, 3)), label="before unlearning"
    )
    _method_legend(figure, runs, [dashed])
    return figure


def losses(metrics: Sequence[Row]) -> Figure:
    """The objective and its parts over the steps, every seed thin and the mean thick."""
    series = summary.loss_series(metrics)
    figure = new_figure(2.9)
    panels = figure.subplots(1, len(series), squeeze=False)[0]
    methods = list(dict.fromkeys(method for runs in series.values() for method, _ in runs))
    for axes, (name, runs) in zip(panels, series.items(), strict=True):
        for method in methods:
            seeds = [dict(points) for (owner, _), points in runs.items() if owner == method]
            if not seeds:
                continue
            colour = LIGHT[method_colour(method, methods)]
            for points in seeds if len(seeds) > 1 else ():
                axes.plot(points.keys(), points.values(), color=colour, lw=0.8, alpha=0.35)
            shared = sorted(set.intersection(*(set(points) for points in seeds)))
            mean = [fmean(points[step] for points in seeds) for step in shared]
            axes.plot(shared, mean, color=colour, lw=2, zorder=4)
        axes.set_title(name)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    panels[0].set_ylabel("loss")
    handles = [
        Line2D(
            [], [], color=LIGHT[method_colour(method, methods)], lw=2.6, label=method_label(method)
        )
        for method in methods
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def _seeds_and_mean(axes: Axes, run: Trajectory, key: str) -> None:
    colour = LIGHT[method_colour(run.method)]
    if len(run.seeds) > 1:
        for rows in run.seeds.values():
            axes.plot(*columns(rows, ("step", key)), color=colour, lw=1, alpha=0.4)
    axes.plot(*columns(run.mean, ("step", key)), color=colour, lw=2.4, zorder=4)


def _method_legend(
    figure: Figure, runs: Sequence[Trajectory], extra: Sequence[Line2D] = ()
) -> None:
    handles = []
    for run in runs:
        colour, count = LIGHT[method_colour(run.method)], len(run.seeds)
        label = method_label(run.method) + (f", mean of {count} seeds" if count > 1 else "")
        handles.append(Line2D([], [], color=colour, lw=2.6, label=label))
    if any(len(run.seeds) > 1 for run in runs):
        handles.append(Line2D([], [], color=LIGHT["muted"], lw=1, label="single seed"))
    handles += extra
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), columnspacing=2.2)
