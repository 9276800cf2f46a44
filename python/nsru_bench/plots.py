"""The pictures of step.csv and of a GPU's linear.csv, PNGs beside them.

    python -m nsru_bench.plots [FOLDER]         # default: benchmarks/results

A file with runs of several devices gives the picture of its last one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from nsru_bench import rows as csv_rows
from nsru_bench.cases import PUBLISHED
from nsru_bench.rows import Row

BACKENDS = {"cuda": "CUDA kernels", "triton": "Triton kernels", "eager": "library GEMMs"}
WAYS = (*BACKENDS.values(), "unsloth", "peft bf16", "peft default, autocast", "eager activation")
RANK = 16
RC = {"font.size": 8, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.2}


def main(folder: Path = csv_rows.RESULTS) -> list[Path]:
    """Draw every step.csv in ``folder`` and below, and linear.csv of GPUs; the pictures made."""
    made = [draw(path, step_memory) for path in sorted(folder.rglob("step.csv"))]
    for path in sorted(folder.rglob("linear.csv")):
        if any(row["timing"] == "graph" for row in read(path)):
            made.append(draw(path, linear_ratios))
    return made


def draw(path: Path, picture: Callable[[list[Row]], Figure]) -> Path:
    """The picture of one CSV file: a PNG of the same name."""
    png = path.with_suffix(".png")
    with matplotlib.rc_context(RC):
        picture(read(path)).savefig(png, dpi=90, metadata={"Software": None})
    print(f"wrote {png}")
    return png


def read(path: Path) -> list[Row]:
    """The rows of the device and kind of size that the last row was measured at."""
    rows = csv_rows.read(path)
    kinds = ("device", "tiny")
    return [row for row in rows if all(row[name] == rows[-1][name] for name in kinds)]


def step_memory(rows: list[Row]) -> Figure:
    """step.csv: what each way keeps between steps and needs on top during one."""
    cases = list(dict.fromkeys(map(case_of, rows)))
    figure = Figure((7, 0.8 + 0.3 * len(rows) + 0.4 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    for panel, case in zip(panels, cases, strict=True):
        shown = {row["provider"]: row for row in rows if case_of(row) == case}
        resident = [float(row["resident_bytes"]) / 1e9 for row in shown.values()]
        extra = [float(row["peak_bytes"] or 0) / 1e9 for row in shown.values()]
        panel.barh(list(shown), resident, label="between steps")
        panel.barh(list(shown), extra, left=resident, label="more during a step")
        panel.invert_yaxis()
        panel.set_title(case, loc="left")
        panel.tick_params(labelsize=8)
    panels[-1].set_xlabel("GB")
    panels[0].legend(fontsize=8)
    return figure


def linear_ratios(rows: list[Row]) -> Figure:
    """linear.csv: forward and backward of each way at the published shapes, the frozen linear 1."""
    figure = Figure((7, 6.5), layout="constrained")
    for panel, (m, k, n) in zip(figure.subplots(len(PUBLISHED), 1), PUBLISHED, strict=True):
        shown = best_ratios(rows, "forward+backward", m, k, n)
        bars = panel.barh(list(shown), list(shown.values()))
        panel.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_xlim(0, 1.1 * max(shown.values()))
        panel.invert_yaxis()
        panel.set_title(f"{m} tokens, {k} to {n} features, {rows[0]['dtype']}", loc="left")
    panel.set_xlabel(f"forward and backward, frozen nn.Linear = 1 ({rows[0]['device']})")
    return figure


def best_ratios(rows: list[Row], which: str, m: int, k: int, n: int) -> dict[str, float]:
    """Way → ratio to the frozen linear; of a backend its best plan."""
    best: dict[str, float] = {}
    sizes = [str(m), str(k), str(n), str(RANK)]
    for row in rows:
        if row["pass"] == which and [row[name] for name in "MKNR"] == sizes:
            name = BACKENDS.get(row["plan"].split()[0], "") if row["plan"] else row["provider"]
            if name in WAYS:
                best[name] = min(float(row["ratio"]), best.get(name, math.inf))
    return {name: best[name] for name in WAYS if name in best}


def case_of(row: Row) -> str:
    again = ", recomputed activations" if row["checkpointing"] == "True" else ""
    return f"{row['model']}, {row['layers']} layers, {row['tokens']} tokens, {row['dtype']}{again}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=csv_rows.RESULTS)
    main(parser.parse_args().folder)
