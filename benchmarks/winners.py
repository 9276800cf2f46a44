"""The plan table of a GPU from the rows that were measured on it; see ``nsru_kernels/plans``."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PREFIX = "plan "  # of providers that are one backend's functions, by one plan
COLUMNS = ("device", "torch", "triton", "commit", "dtype")


def plan_table(folder: Path) -> dict[str, Any]:
    """What ``nsru_kernels/plans/<gpu>.json`` holds, from linear.csv and fold.csv in ``folder``.

    Raises:
        ValueError: the rows are of several devices, dtypes or commits, or of tiny sizes.
    """
    linear, fold = (_rows(folder / f"{op}.csv") for op in ("linear", "fold"))
    runs = {tuple(row[column] for column in COLUMNS) for row in (*linear, *fold)}
    if len(runs) != 1:
        raise ValueError(f"plans need the rows of one run, {folder} has {sorted(runs)}.")
    if any(row["tiny"] == "True" for row in (*linear, *fold)):
        raise ValueError(f"{folder} holds a walk through tiny sizes, no measurement.")
    table: dict[str, Any] = dict(zip(COLUMNS, runs.pop(), strict=True))
    return table | {"linear": linear_entries(linear), "fold": fold_entries(fold)}


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
    """The grouped launch where it beats the loop for every dtype of the basis."""
    by_basis: dict[str, dict[str, float]] = {}
    for row in rows:
        by_basis.setdefault(row["basis"], {})[row["provider"]] = float(row["p50_ms"])
    if not by_basis:
        return []
    grouped = all(_fastest(times).startswith("triton") for times in by_basis.values())
    return [{"sizes": [], "fold_many": "triton" if grouped else "eager"}]


def _fastest(times: dict[str, float]) -> str:
    return min(times, key=times.__getitem__)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
