"""Pictures of the benchmarks' CSV files, each PNG beside its file.

    python benchmarks/plot.py [FOLDER]         # default: benchmarks/results

A file with runs of several devices gives the picture of its last one.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from nsru_bench import measure, plot_costs

Row = dict[str, str]

RC = {"font.size": 8, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.2}
MARKERS = "osD^vX*P"
FLOORED = ("linear", "siblings", "fold", "sketch", "loss", "step")


def main(folder: Path = measure.RESULTS) -> list[Path]:
    """Draw every known CSV file in ``folder`` and below; the pictures made."""
    made = [draw(path) for path in sorted(folder.rglob("*.csv")) if path.name in PLOTS]
    return made + [draw_roofline(path.parent) for path in sorted(folder.rglob("linear.csv"))]


def draw(path: Path) -> Path:
    """The picture of one CSV file: a PNG of the same name."""
    return save(PLOTS[path.name], read(path), path.with_suffix(".png"))


def draw_roofline(folder: Path) -> Path:
    """One picture of all files in ``folder`` whose rows have a floor."""
    files = [folder / f"{op}.csv" for op in FLOORED]
    rows = [row for file in files if file.is_file() for row in read(file)]
    return save(plot_costs.roofline, rows, folder / "roofline.png")


def save(figure_of: Callable[[list[Row]], Figure], rows: list[Row], png: Path) -> Path:
    with matplotlib.rc_context(RC):
        figure_of(rows).savefig(png, dpi=90, metadata={"Software": None})
    print(f"wrote {png}")
    return png


def error_plots(rows: list[Row]) -> Figure:
    """sketch_accuracy.csv: a panel for each spectrum, residual above the optimum against width."""
    rows = [row for row in rows if row["ratio"] and row["dtype"] == "float32"]
    sized = [row for row in rows if row["K"] != row["L"]]  # the covariance has no width
    spectra = unique(sized, "spectrum")
    columns = min(4, len(spectra))
    lines = -(-len(spectra) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.1 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    for panel, spectrum in zip(panels, spectra, strict=False):
        for index, provider in enumerate(unique(sized, "provider")):
            shown = select(sized, spectrum=spectrum, provider=provider)
            widths = [int(row["L"]) for row in shown]
            # A residual equal to the optimum has no place on a log axis.
            above = [max(float(row["ratio"]) - 1, 1e-5) for row in shown]
            label = provider + (" (centres)" if shown[0]["centred"] == "True" else "")
            panel.plot(widths, above, marker=MARKERS[index], markersize=3.5, label=label)
        panel.set(yscale="log", title=spectrum)
    for panel in panels[len(spectra) :]:
        panel.remove()
    last = rows[-1]
    figure.supxlabel(f"width L (K = {last['K']}, Q = {last['Q']}, {last['tokens']} tokens)")
    figure.supylabel("residual energy / optimum - 1")
    share_legend(figure)
    return figure


def memory(rows: list[Row]) -> Figure:
    """loss.csv and nll_memory.csv: peak bytes of forward and backward against tokens."""
    rows = [row for row in rows if row["peak_bytes"]]
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    panel = figure.subplots()
    for index, provider in enumerate(unique(rows, "provider")):
        shown = select(rows, provider=provider)
        tokens = [int(row["T"]) for row in shown]
        mebibytes = [int(row["peak_bytes"]) / 2**20 for row in shown]
        panel.plot(tokens, mebibytes, marker=MARKERS[index], markersize=4, label=provider)
    last = rows[-1]
    panel.set_xscale("log", base=2)
    panel.set(yscale="log", xlabel="tokens", ylabel="peak memory, MiB")
    panel.set_title(f"vocabulary {last['V']}, {last['dtype']}, {last['device']}", fontsize=8)
    ticks = sorted({int(row["T"]) for row in rows})
    panel.set_xticks(ticks, [str(count) for count in ticks])
    panel.legend()
    return figure


def read(path: Path) -> list[Row]:
    """The rows of the device and kind of size that the last row was measured at."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    same = {name: rows[-1][name] for name in ("device", "tiny") if name in rows[-1]}
    return select(rows, **same)


def select(rows: Sequence[Row], **values: str) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def unique(rows: Sequence[Row], column: str) -> list[str]:
    """Values of a column in order of appearance."""
    return list(dict.fromkeys(row[column] for row in rows))


def share_legend(figure: Figure) -> None:
    """One legend above all panels."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)


# file name → what draws its rows
PLOTS: dict[str, Callable[[list[Row]], Figure]] = {
    "sketch_accuracy.csv": error_plots,
    "loss.csv": memory,
    "nll_memory.csv": memory,
    "linear.csv": plot_costs.ratios,
    "step.csv": plot_costs.memory,
    "scaling.csv": plot_costs.growth,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=measure.RESULTS)
    main(parser.parse_args().folder)
