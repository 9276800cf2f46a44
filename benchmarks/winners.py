"""The plan table of a GPU from the rows that were measured on it; see ``nsru_kernels/plans``."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from math import inf
from pathlib import Path
from typing import Any

PREFIX = "plan "  # of providers that are one backend's functions, by one plan
COLUMNS = ("device", "torch", "triton", "commit", "dtype")


def plan_table(folder: Path) -> dict[str, Any]:
    """What ``nsru_kernels/plans/<gpu>.json`` holds, from the rows of linear, fold and sketch.

    Raises:
        ValueError: the rows are of several devices, dtypes or commits, or of tiny sizes.
    """
    linear, fold, sketch = (_rows(folder / f"{op}.csv") for op in ("linear", "fold", "sketch"))
    rows = [*linear, *fold, *sketch]
    runs = {tuple(row[column] for column in COLUMNS) for row in rows}
    if len(runs) != 1:
        raise ValueError(f"plans need the rows of one run, {folder} has {sorted(runs)}.")
    if any(row["tiny"] == "True" for row in rows):
        raise ValueError(f"{folder} holds a walk through tiny sizes, no measurement.")
    table: dict[str, Any] = dict(zip(COLUMNS, runs.pop(), strict=True))
    return table | {
        "linear": linear_entries(linear),
        "fold": fold_entries(fold),
        "sketch": sketch_entries(sketch),
    }


def linear_entries(rows: Iterable[dict[str, str]]) -> list[dict[str, Any]]:
    """One entry per shape: the fastest plan forward, the fastest backend backward."""
    by_shape: dict[tuple[int, ...], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["provider"].startswith(PREFIX):
            sizes = tuple(int(row[size]) for size in "MKNR")
            passes = by_shape.setdefault(sizes, {})
            name = row["provider"].removeprefix(PREFIX)
            # The same sizes at another Q: plans see no basis, so the first row says it all.
            passes.setdefault(row["pass"], {}).setdefault(name, float(row["p50_ms"]))
    return [
        {
            "sizes": list(sizes),
            "forward": _fastest(passes["forward"]),
            "backward": _fastest(passes["backward"]).split()[0],
        }
        for sizes, passes in sorted(by_shape.items())
        if {"forward", "backward"} <= passes.keys()  # a run that was cut off has one of them
    ]


def fold_entries(rows: Iterable[dict[str, str]]) -> list[dict[str, Any]]:
    """For each number of adapters: the grouped launch that beats the loop for every dtype of the
    basis, by most in sum; else the loop."""
    by_count: dict[int, dict[str, dict[str, float]]] = {}
    for row in rows:
        bases = by_count.setdefault(int(row["adapters"]), {})
        bases.setdefault(row["basis"], {})[row["provider"]] = float(row["p50_ms"])
    entries = []
    every_basis = {basis for bases in by_count.values() for basis in bases}
    for count, bases in sorted(by_count.items()):
        whole = all("eager, a loop" in times for times in bases.values())
        if bases.keys() != every_basis or not whole:
            continue  # a run that was cut off
        total = {"eager": sum(times["eager, a loop"] for times in bases.values())}
        for backend in ("triton", "cuda"):
            grouped = f"{backend}, one launch"
            if all(times.get(grouped, inf) < times["eager, a loop"] for times in bases.values()):
                total[backend] = sum(times[grouped] for times in bases.values())
        entries.append({"sizes": [count], "fold_many": _fastest(total)})
    return entries


def sketch_entries(rows: Iterable[dict[str, str]]) -> list[dict[str, Any]]:
    """One entry per shape: the fastest plan of a batch's update."""
    by_shape: dict[tuple[int, ...], dict[str, float]] = {}
    for row in rows:
        if row["pass"] == "update" and row["provider"].startswith(PREFIX):
            sizes = tuple(int(row[size]) for size in "MKL")
            name = row["provider"].removeprefix(PREFIX)
            by_shape.setdefault(sizes, {})[name] = float(row["p50_ms"])
    return [
        {"sizes": list(sizes), "update_sketch": _fastest(times)}
        for sizes, times in sorted(by_shape.items())
    ]


def _fastest(times: dict[str, float]) -> str:
    return min(times, key=times.__getitem__)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
