"""The picture of step.csv, a PNG beside it.

    python -m nsru_bench.plots [FOLDER]         # default: benchmarks/results

A file with runs of several devices gives the picture of its last one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from nsru_bench import rows as csv_rows
from nsru_bench.rows import Row

RC = {"font.size": 8, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.2}


def main(folder: Path = csv_rows.RESULTS) -> list[Path]:
    """Draw every step.csv in ``folder`` and below; the pictures made."""
    return [draw(path) for path in sorted(folder.rglob("step.csv"))]


def draw(path: Path) -> Path:
    """The picture of one CSV file: a PNG of the same name."""
    png = path.with_suffix(".png")
    with matplotlib.rc_context(RC):
        step_memory(read(path)).savefig(png, dpi=90, metadata={"Software": None})
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


def case_of(row: Row) -> str:
    again = ", recomputed activations" if row["checkpointing"] == "True" else ""
    return f"{row['model']}, {row['layers']} layers, {row['tokens']} tokens, {row['dtype']}{again}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=csv_rows.RESULTS)
    main(parser.parse_args().folder)
