"""Pictures of the benchmarks' CSV files, each PNG beside its file.

    python -m nsru_bench.plots [FOLDER]         # default: benchmarks/results

A file with runs of several devices gives the picture of its last one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nsru_bench import rows as csv_rows
from nsru_bench.rows import PREFIX, Row

RC = {"font.size": 8, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.2}
PEERS = ("peft bf16", "peft default, autocast", "eager activation", "eager materialised")
RATIO_MARKERS = dict(zip(("nsru", "best plan", *PEERS), "oDsv^x", strict=True))


def main(folder: Path = csv_rows.RESULTS) -> list[Path]:
    """Draw every known CSV file in ``folder`` and below; the pictures made."""
    return [draw(path) for path in sorted(folder.rglob("*.csv")) if path.name in PLOTS]


def draw(path: Path) -> Path:
    """The picture of one CSV file: a PNG of the same name."""
    png = path.with_suffix(".png")
    with matplotlib.rc_context(RC):
        PLOTS[path.name](read(path)).savefig(png, dpi=90, metadata={"Software": None})
    print(f"wrote {png}")
    return png


def read(path: Path) -> list[Row]:
    """The rows of the device and kind of size that the last row was measured at."""
    rows = csv_rows.read(path)
    return select(rows, **{n: rows[-1][n] for n in ("device", "tiny") if rows and n in rows[-1]})


def select(rows: Sequence[Row], **values: str) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def unique(values: Any) -> list[str]:
    """Each value once, in order of appearance."""
    return list(dict.fromkeys(values))


def column(rows: Sequence[Row], name: str) -> list[str]:
    return unique(row[name] for row in rows)


def ratios(rows: list[Row]) -> Figure:
    """linear.csv: one line per shape, one mark per way, the floor of the device as a bar."""
    rows = select(rows, dtype=rows[-1]["dtype"])
    passes, shapes = column(rows, "pass"), unique(map(shape_of, rows))
    figure = Figure((2 + 2.8 * len(passes), 1.4 + 0.32 * len(shapes)), layout="constrained")
    panels = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    for panel, which in zip(panels, passes, strict=True):
        for y, shape in enumerate(shapes):
            shown = [row for row in select(rows, **{"pass": which}) if shape_of(row) == shape]
            _draw_ratios(panel, y, {row["provider"]: row for row in shown})
        panel.axvline(1, color="grey", linewidth=0.8, zorder=0)
        panel.set(title=which, xlabel="ratio to the frozen linear")
        panel.set_xlim(left=0)
    panels[0].set_yticks(range(len(shapes)), shapes, fontsize=7)
    panels[0].invert_yaxis()
    found = [pair for p in panels for pair in zip(*p.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in found}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    return figure


def shape_of(row: Row) -> str:
    return f"{row['M']} × {row['K']} → {row['N']}, R {row['R']}, Q {row['Q']}"


def _draw_ratios(panel: Axes, y: int, by_name: dict[str, Row]) -> None:
    frozen = by_name.get("frozen")
    if frozen is None:
        return
    base = float(frozen["p50_ms"])
    floor = float(frozen["floor_ms"]) / base
    panel.plot([floor, floor], [y - 0.35, y + 0.35], color="black", linewidth=2, label="floor")
    plans = [row for name, row in by_name.items() if name.startswith(PREFIX)]
    if plans:
        by_name["best plan"] = min(plans, key=lambda row: float(row["p50_ms"]))
    for index, (name, marker) in enumerate(RATIO_MARKERS.items()):
        if name in by_name:
            ratio = float(by_name[name]["p50_ms"]) / base
            panel.plot(ratio, y, marker, color=f"C{index}", markersize=5, label=name, linestyle="")


def step_memory(rows: list[Row]) -> Figure:
    """step.csv: what each way keeps between steps and needs on top during one."""
    cases = unique(map(case_of, rows))
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


# file name → what draws its rows
PLOTS: dict[str, Callable[[list[Row]], Figure]] = {
    "linear.csv": ratios,
    "step.csv": step_memory,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=csv_rows.RESULTS)
    main(parser.parse_args().folder)
