"""Tables of a report: rows of results.json and metrics.jsonl as text in cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from nsru_kernels.subspaces.collection import separation
from nsru_train.eval_results import METRICS, task_cells

from . import summary
from .summary import (
    FEW_METHODS,
    FORGET_TARGET,
    PROBABILITIES,
    RETAIN_TARGET,
    SAFE_TARGET,
    Row,
    label,
    number,
)

NAMES = {
    **PROBABILITIES,
    "step_seconds": "seconds a step",
    "peak_bytes": "peak memory, MiB",
    "seconds": "seconds of training",
    "mean_retain_rank": "mean rank of the retain subspaces",
    "rank": "rank Q",
    "in_features": "inputs",
}
# Quantity -> the goal in words, and as a test of the values after and before.
GOALS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "forget_prob": (f"at most {FORGET_TARGET:g}", lambda after, before: after <= FORGET_TARGET),
    "safe_prob": (f"at least {SAFE_TARGET:g}", lambda after, before: after >= SAFE_TARGET),
    "retain_prob": (
        f"at least {RETAIN_TARGET:.0%} of before",
        lambda after, before: after >= RETAIN_TARGET * before,
    ),
}
ROWS_OVER_STEPS = 20


@dataclass(frozen=True)
class Table:
    """Heads of the columns, and rows that start with their own; folded under a title if given."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


def headline(results: Row, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Probabilities before and after for each method, and in how many seeds it met the goal."""
    setup = results.get("setup") or {}
    counts, sizes = setup.get("questions") or {}, setup.get("sizes") or {}
    lines = []
    for key, title in PROBABILITIES.items():
        cells = [_reached(results, key, method) for method in methods]
        if any(cells):
            name = "forget" if key == "safe_prob" else key.removesuffix("_prob")
            asked = counts.get(name)
            if sizes.get(name, asked) != asked:
                asked = f"{asked} of {sizes[name]}"
            before = _probability(summary.before_value(results, key))
            lines.append({"title": title, "asked": asked, "before": before, "cells": cells})
    return lines


def _reached(results: Row, key: str, method: str) -> dict[str, Any]:
    runs = [
        (row[key], summary.before_value(results, key, row.get("seed")))
        for row in summary.of_method(results.get("methods") or [], method)
        if number(row.get(key)) is not None
    ]
    if not runs:
        return {}
    after = [value for value, _ in runs]
    cell: dict[str, Any] = {"value": _probability(fmean(after))}
    if len(runs) > 1:
        cell["spread"] = f"seeds {_probability(min(after))} to {_probability(max(after))}"
    if key in GOALS:
        goal, meets = GOALS[key]
        count = sum(meets(value, float("inf") if start is None else start) for value, start in runs)
        met = "met" if count else "not met"
        met = f"met in {count} of {len(runs)} seeds" if len(runs) > 1 else met
        cell |= {"met": count == len(runs), "verdict": f"Goal {goal}: {met}"}
    return cell


def damage(results: Row, key: str) -> dict[str, Any] | None:
    """Damage at equal forgetting: the first method against the others, in words and by seed."""
    matched = summary.matched_damage(results, key)
    if not matched:
        return None
    methods = [name.removesuffix("_damage") for name in matched[0] if name.endswith("_damage")]
    mean = {m: fmean(row[f"{m}_damage"] for row in matched) for m in methods}
    first, *others = methods
    rivals = summary.rivals(others)
    those = "" if rivals == others else " without projection"
    others = rivals
    best = min(others, key=mean.__getitem__)
    ratio, words = "–", f"no ratio: {label(best, short=True)} did no measurable damage"
    if mean[best] > 0 >= mean[first]:
        ratio, words = "0×", f"{label(first)} did no measurable damage"
    elif mean[best] > 0:
        ratio = f"{mean[first] / mean[best]:.2f}×"
        words = f"the damage of {label(best, short=True)}, mean over seeds"
    wins = sum(all(row[f"{first}_damage"] < row[f"{m}_damage"] for m in others) for row in matched)
    than = f" than every other method{those}" if len(others) > 1 else ""
    heading = f"ratio to the best other{those}" if len(others) > 1 or those else "ratio"
    few = len(methods) <= FEW_METHODS
    versus = ", ".join(map(label, others)) if few else "all others without projection"
    rows = [
        [
            f"seed {row['seed']}",
            *(f"{row[f'{method}_damage']:.4f}" for method in methods),
            "–" if row["ratio"] is None else f"{row['ratio']:.2f}×",
        ]
        for row in matched
    ]
    return {
        "ratio": ratio,
        "words": words,
        "versus": f"{label(first)} against {versus}, at matched forgetting",
        "level": _probability(matched[0]["forget_prob"]),
        "met": wins == len(matched),
        "verdict": f"{label(first)} does less damage{than} in {wins} of {len(matched)} seeds",
        "table": (
            Table(["", *(label(m, short=True) for m in methods), heading], rows)
            if few
            else _damage_by_method(matched, mean)
        ),
    }


def _damage_by_method(matched: Sequence[Row], mean: Mapping[str, float]) -> Table:
    """A row for each method, the one that does least damage first."""
    return Table(
        ["", *(f"seed {row['seed']}" for row in matched), "mean"],
        [
            [label(m), *(f"{row[f'{m}_damage']:.4f}" for row in matched), f"{mean[m]:.4f}"]
            for m in sorted(mean, key=mean.__getitem__)
        ],
    )


def numbers(results: Row) -> list[Table]:
    """Every number of "metrics", by split and overall, and of "methods", by run."""
    metrics = results.get("metrics")
    metrics = metrics if isinstance(metrics, Mapping) else {}
    splits = {name: row for name, row in metrics.items() if isinstance(row, Mapping)}
    columns = list(dict.fromkeys(key for row in splits.values() for key in row))
    methods = results.get("methods") or []
    names = ("before", *summary.method_names(methods))
    runs = [row for method in names for row in summary.of_method(methods, method)]
    keys = dict.fromkeys(key for row in runs for key in row if key != "seed")
    found = [
        attacks(results.get("attacks") or []),
        Table(
            ["split", *(METRICS.get(key, _name(key)) for key in columns)],
            [[split, *(_show(row.get(key)) for key in columns)] for split, row in splits.items()],
        ),
        tasks(results, parts=False),
        tasks(results, parts=True),
        Table(
            ["over all splits", "value"],
            [[_name(k), _show(v)] for k, v in metrics.items() if number(v) is not None],
        ),
        _of_runs(runs, [key for key in keys if summary.values(runs, key)]),
    ]
    return [table for table in found if table.rows]


def _of_runs(runs: Sequence[Row], keys: Sequence[str]) -> Table:
    """A column for each run; of many methods a row."""
    names = [_run(row.get("method"), row.get("seed")) for row in runs]
    found = [[_show(row.get(key), key) for row in runs] for key in keys]
    if len(summary.method_names(runs)) <= FEW_METHODS:
        return Table(["", *names], [[_name(k), *row] for k, row in zip(keys, found, strict=True)])
    by_run = zip(names, zip(*found, strict=True), strict=True)
    return Table(["", *map(_name, keys)], [[name, *row] for name, row in by_run])


def by_method(headline: Sequence[Row], methods: Sequence[str]) -> Table:
    """`headline` with a row for each method, for many of them."""
    cells = [["Base model", *(line["before"] for line in headline)]]
    for place, method in enumerate(methods):
        shown = [line["cells"][place].get("value", "–") for line in headline]
        cells.append([label(method), *shown])
    return Table(["mean over seeds", *(line["title"] for line in headline)], cells)


def tasks(results: Row, *, parts: bool) -> Table:
    """Metrics of lm-eval's tasks that were asked for, or of those that make up groups of them."""
    rows = [row for row in results.get("tasks") or [] if ("group" in row) == parts]
    head, *cells = task_cells(rows)
    return Table(head, cells, "Numbers of every task in a group" if parts else "")


def attacks(rows: Sequence[Row]) -> Table:
    """Numbers of the forget set after each attack, and the share of them that survives it."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(("forget", "robust")))
    cells = [[str(row["name"]), *(_show(row.get(key)) for key in keys)] for row in rows]
    return Table(["attack", *map(_name, keys)], cells)


def answering(examples: Sequence[Row]) -> dict[str, str]:
    """Keys of the models' answers in "examples", with their labels."""
    keys = dict.fromkeys(key for row in examples for key in row if row[key] is not None)
    others = ("split", "question", "original", "safe_target")
    return {key: label(key) for key in keys if key not in others}


def shown(results: Row, split: str) -> str:
    """The count of a split's questions in "examples", as "8 of 12"; "" where that is unknown."""
    metrics = (results.get("metrics") or {}).get(split)
    count = number(metrics.get("count")) if isinstance(metrics, Mapping) else None
    found = sum(row.get("split") == split for row in results.get("examples") or [])
    return "" if count is None else f"{found} of {count:.0f}"


def over_steps(curves: summary.Curves) -> Table:
    """Means over the seeds, at some of the steps where there are many."""
    columns = {
        f"{title}, {label(method, short=True)}": dict(
            summary.mean_curve(points for (owner, _), points in runs.items() if owner == method)
        )
        for title, runs in curves.items()
        for method in dict.fromkeys(method for method, _ in runs)
    }
    steps = sorted({step for column in columns.values() for step in column})
    count = min(len(steps), ROWS_OVER_STEPS)
    chosen = [steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)]
    rows = [[f"{step:g}", *(_show(c.get(step)) for c in columns.values())] for step in chosen]
    return Table(["step", *columns], rows, "Numbers (mean over seeds)")


def subspaces(found: Sequence[Row]) -> Table:
    """Size, rank and diagnostics of each retain subspace."""
    keys = ("in_features", "rank", "captured_energy", "editability", "tokens")
    rows = [
        [
            " · ".join(map(str, row.get("modules") or [row.get("name")])),
            *(_show(row.get(key)) for key in keys),
            _separation(row),
            "yes" if row.get("rank_limited") else "no",
        ]
        for row in found
    ]
    return Table(
        ["read by", *map(_name, keys), "separation", "cut short"], rows, "Numbers of every subspace"
    )


def _separation(row: Row) -> str:
    captured, open_ = number(row.get("captured_energy")), number(row.get("editability"))
    return "–" if captured is None or open_ is None else f"{separation(captured, open_):.1f}"


def leakage(found: Sequence[Row]) -> Table:
    """Median and largest leakage of each kind of linear."""
    kinds: dict[str, list[float]] = {}
    for row in found:
        if number(row.get("leakage")) is not None:
            kinds.setdefault(summary.kind(row.get("module")), []).append(row["leakage"])
    rows = [
        [kind, str(len(values)), f"{median(values):.2g}", f"{max(values):.2g}"]
        for kind, values in kinds.items()
    ]
    return Table(["kind", "adapters", "median", "largest"], rows, "Numbers by kind of linear")


def _run(method: Any, seed: Any) -> str:
    return label(str(method), short=True) + ("" if seed is None else f", seed {seed}")


def _name(key: str) -> str:
    return NAMES.get(key, key.replace("_", " "))


def _show(value: Any, key: str = "") -> str:
    found = number(value)
    if found is None:
        return "–"
    if key == "peak_bytes":
        return f"{found / 2**20:.0f}"
    return str(value) if isinstance(value, int) else f"{found:.4g}"


def _probability(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value >= 1e-3 or value <= 0 else "<0.001"
