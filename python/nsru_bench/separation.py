"""Separation by floor: what a projection can do on a model, from the subspaces estimated on it.

    python -m nsru_bench.separation smollm2=runs/smollm2/subspaces --out separation.csv

Each NAME=FOLDER is a folder that `nsru subspace` or a run wrote, estimated by a floor of the
editability. A row for each floor: the separations of the model's inputs at the largest rank that
leaves it. Nothing is computed anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from nsru_bench import rows
from nsru_kernels.subspaces.collection import InputDiagnostics, SubspaceSet, separation
from nsru_kernels.subspaces.estimate import open_rank

FLOORS = (0.4, 0.2, 0.1, 0.05, 0.02)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    found: list[dict[str, Any]] = []
    for name, _, folder in (pair.partition("=") for pair in args.folders):
        inputs = SubspaceSet.load(folder).inputs
        for floor in FLOORS:
            values = [value for entry in inputs if (value := at_floor(entry, floor)) is not None]
            if not values:
                parser.error(f"{folder} has no editability by rank; estimate with a forget set")
            row = {"median": median(values), "least": min(values), "most": max(values)}
            found.append({"model": name, "floor": floor, "inputs": len(values), **row})
            print(f"{name}, {floor:.0%} open: separation {row['median']:.2f}")
    rows.replace(args.out, [{**row, **rows.run_columns("transformers")} for row in found])


def at_floor(entry: InputDiagnostics, floor: float) -> float | None:
    """Separation at the rank that leaves ``floor`` open; None without an editability by rank."""
    if entry.editability_by_rank is None:
        return None
    rank = open_rank(entry.editability_by_rank, floor)
    return separation(sum(entry.spectrum[:rank]), entry.editability_by_rank[rank])


if __name__ == "__main__":
    main()
