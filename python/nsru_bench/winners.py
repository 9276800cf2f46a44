"""The plan table of a device from the rows that were measured on it; see ``nsru_kernels/plans``.

    python -m nsru_bench.winners FOLDER        # of the CSV files that `nsru bench` wrote

Writes the table where ``auto`` finds it: for a GPU by its name, for a CPU as that of CPUs with AMX.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from math import inf
from pathlib import Path
from typing import Any

from nsru_bench.internals import CPU_WITH_AMX, FOLDER, slug
from nsru_bench.rows import PREFIX, Row, read

MARGIN = 0.95  # of eager's time, for a kernel on a CPU
GPU_MARGIN = 0.98  # for any other plan on a GPU
COLUMNS = ("device", "torch", "triton", "commit", "dtype")


def write_plans(folder: Path) -> Path:
    """Write the plan table of the rows in ``folder``; the path of its file.

    Raises:
        ValueError: the rows make no table; see ``plan_table``.
    """
    table = plan_table(folder)
    # Only a CPU's table says how many threads it holds for.
    path = FOLDER / f"{slug(CPU_WITH_AMX if 'threads' in table else table['device'])}.json"
    path.write_text(json.dumps(table, indent=1) + "\n")
    return path


def plan_table(folder: Path) -> dict[str, Any]:
    """The content of a file of ``nsru_kernels/plans``, from the rows of linear, siblings, fold.

    A CPU's table has "threads".

    Raises:
        ValueError: the rows are of several devices, dtypes or commits, or of tiny sizes, or of a
            CPU that cannot run the kernels.
    """
    linear, siblings, fold = (read(folder / f"{op}.csv") for op in ("linear", "siblings", "fold"))
    linears = [*linear, *siblings]
    on_cpu = any(row["timing"] == "clock" for row in linears)  # GPUs are timed by graphs or events
    rows, columns = [*linears, *fold], (*COLUMNS, "threads") if on_cpu else COLUMNS
    runs = {tuple(row[column] for column in columns) for row in rows}
    if len(runs) != 1:
        raise ValueError(f"plans need the rows of one run, {folder} has {sorted(runs)}.")
    if any(row["tiny"] == "True" for row in rows):
        raise ValueError(f"{folder} holds a walk through tiny sizes, no measurement.")
    table: dict[str, Any] = dict(zip(columns, runs.pop(), strict=True))
    entries = whole_entries if on_cpu else linear_entries
    table |= {"linear": entries(linear), "linear_group": entries(siblings)}
    table["fold"] = fold_entries(fold)
    if not on_cpu:
        return table
    if not any(row["provider"] == f"{PREFIX}cpu" for row in rows):
        raise ValueError(f"{folder} has no times of the CPU kernels: no AMX here, or not bf16?")
    return table | {"threads": int(table["threads"])}


def whole_entries(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One entry per shape: the fastest backend of forward and backward together, for on a CPU what
    one of them leaves in the caches decides about the other.

    A kernel wins by 5 % or not at all: less comes and goes from run to run. Only entries that
    change what ``auto`` does: a kernel won, or eager did so close to where a kernel won that the
    kernel's entry would serve some of its calls.
    """
    entries = []
    for sizes, passes in _by_shape(rows):
        if times := passes.get("forward+backward"):
            winner = _fastest(times | {"eager": MARGIN * times["eager"]})
            entries.append({"sizes": list(sizes), "forward": winner, "backward": winner})
    won = [entry for entry in entries if entry["forward"] != "eager"]
    return [e for e in entries if any(_overlap(e["sizes"], other["sizes"]) for other in won)]


def _overlap(sizes: list[int], others: list[int]) -> bool:
    """True where a call can be within a factor of two of both."""
    return all(max(a, b) <= 4 * min(a, b) for a, b in zip(sizes, others, strict=True))


def linear_entries(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One entry per shape: the fastest plan of each pass. The rows of siblings have ΣN and ΣR as N
    and R. A plan without a configuration names nothing that a backward could choose."""
    return [
        {
            "sizes": list(sizes),
            "forward": _clear_winner(passes["forward"]),
            "backward": _of_backward(_clear_winner(passes["backward"])),
        }
        for sizes, passes in _by_shape(rows)
        if {"forward", "backward"} <= passes.keys()  # a run that was cut off has one of them
    ]


def _by_shape(
    rows: Iterable[Row],
) -> list[tuple[tuple[int, ...], dict[str, dict[str, float]]]]:
    """(sizes, pass → plan → milliseconds), in order of the sizes."""
    found: dict[tuple[int, ...], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["provider"].startswith(PREFIX):
            times = found.setdefault(tuple(int(row[letter]) for letter in "MKNR"), {})
            # The same sizes at another Q: plans see no basis, so the first row says it all.
            plan = row["provider"].removeprefix(PREFIX)
            times.setdefault(row["pass"], {}).setdefault(plan, float(row["p50_ms"]))
    return sorted(found.items(), key=lambda item: item[0])


def fold_entries(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """For each number of adapters: the grouped launch that beats the loop for every dtype of the
    basis, by most in sum; else the loop. CPU kernels are asked about float32 only, see MARGIN."""
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
        for backend, margin in (("cpu", MARGIN), ("triton", GPU_MARGIN)):
            asked = [t for basis, t in bases.items() if backend != "cpu" or basis == "float32"]
            grouped, loop = f"{backend}, one launch", "eager, a loop"
            if all(times.get(grouped, inf) < margin * times[loop] for times in asked):
                total[backend] = sum(times.get(grouped, times[loop]) for times in bases.values())
        entries.append({"sizes": [count], "fold_many": _fastest(total)})
    return entries


def _clear_winner(times: dict[str, float]) -> str:
    """The fastest plan, where it is faster than eager's default by more than comes and goes."""
    return _fastest(times | {"eager": GPU_MARGIN * times["eager"]} if "eager" in times else times)


def _of_backward(winner: str) -> str:
    backend, *plan = winner.split()
    return winner if len(plan) > 1 or (plan == ["expand_first"] and backend != "eager") else backend


def _fastest(times: dict[str, float]) -> str:
    return min(times, key=times.__getitem__)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="--out of nsru bench")
    folder = parser.parse_args(arguments).folder
    try:
        path = write_plans(folder)
    except (KeyError, ValueError) as error:
        sys.exit(f"winners: {type(error).__name__}: {error}")
    print(f"wrote {path}", path.read_text(), sep="\n", end="")


if __name__ == "__main__":
    main()
