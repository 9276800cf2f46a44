"""Pictures of what things cost: ratios to the frozen linear, roofline, memory of a step, growth."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, str]

OURS = "nsru"
PEERS = ("peft bf16", "peft default, autocast", "eager activation", "eager materialised")
MARKERS = dict(zip((OURS, "best plan", *PEERS), "oDsv^x", strict=True))


def unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def one_dtype(rows: list[Row]) -> list[Row]:
    """Those of the dtype that was measured last."""
    return [row for row in rows if row["dtype"] == rows[-1]["dtype"]]


def shape_of(row: Row) -> str:
    return f"{row['M']} × {row['K']} → {row['N']}, R {row['R']}, Q {row['Q']}"


def ratios(rows: list[Row]) -> Figure:
    """linear.csv: one line per shape, one mark per way, the floor of the device as a bar."""
    rows = one_dtype(rows)
    passes, shapes = unique(row["pass"] for row in rows), unique(map(shape_of, rows))
    size = (2 + 2.8 * len(passes), 1.4 + 0.32 * len(shapes))
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(1, len(passes), sharey=True, squeeze=False)
    for axis, which in zip(axes[0], passes, strict=True):
        for y, shape in enumerate(shapes):
            chosen = [row for row in rows if (row["pass"], shape_of(row)) == (which, shape)]
            _draw_ratios(axis, y, chosen)
        axis.axvline(1, color="grey", linewidth=0.8, zorder=0)
        axis.set_title(which)
        axis.set_xlabel("ratio to the frozen linear")
        axis.set_xlim(left=0)
    axes[0][0].set_yticks(range(len(shapes)), shapes, fontsize=7)
    axes[0][0].invert_yaxis()
    handles = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _draw_ratios(axis: Axes, y: int, rows: list[Row]) -> None:
    by_name = {row["provider"]: row for row in rows}
    frozen = by_name.get("frozen")
    if frozen is None:
        return
    base = float(frozen["p50_ms"])
    floor = float(frozen["floor_ms"]) / base
    axis.plot([floor, floor], [y - 0.35, y + 0.35], color="black", linewidth=2, label="floor")
    plans = [row for name, row in by_name.items() if name.startswith("plan ")]
    if plans:
        by_name["best plan"] = min(plans, key=lambda row: float(row["p50_ms"]))
    for index, (name, marker) in enumerate(MARKERS.items()):
        if name in by_name:
            ratio = float(by_name[name]["p50_ms"]) / base
            axis.plot(ratio, y, marker, color=f"C{index}", markersize=5, label=name, linestyle="")


def roofline(rows: list[Row]) -> Figure:
    """All files: useful TFLOP/s against useful FLOP per byte, under what the device can do."""
    rows = [row for row in rows if float(row["tflops"]) > 0 and float(row["gbytes_per_s"]) > 0]
    figure = Figure((6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    # A row's floor is its FLOP over the peak or its bytes over the bandwidth, whichever is longer:
    # the largest quotients are the peak and the bandwidth.
    stretch = [float(row["p50_ms"]) / float(row["floor_ms"]) for row in rows]
    peak = max(float(row["tflops"]) * s for row, s in zip(rows, stretch, strict=True))
    bandwidth = max(float(row["gbytes_per_s"]) * s for row, s in zip(rows, stretch, strict=True))
    intensities = [1e3 * float(row["tflops"]) / float(row["gbytes_per_s"]) for row in rows]
    edge = 1e3 * peak / bandwidth
    xs = [min([*intensities, edge]) / 2, edge, max([*intensities, edge]) * 2]
    axis.plot(
        xs, [xs[0] * bandwidth / 1e3, peak, peak], color="black",
        label=f"{peak:.3g} TFLOP/s, {bandwidth:.4g} GB/s",
    )  # fmt: skip
    points: dict[str, list[tuple[float, float]]] = {}
    for x, row in zip(intensities, rows, strict=True):
        points.setdefault(row["op"], []).append((x, float(row["tflops"])))
    for op, pairs in points.items():
        axis.plot(*zip(*pairs, strict=True), "o", markersize=3.5, alpha=0.6, label=op)
    axis.set(xscale="log", yscale="log", xlabel="useful FLOP per byte", ylabel="useful TFLOP/s")
    axis.legend(fontsize=8)
    return figure


def memory(rows: list[Row]) -> Figure:
    """step.csv: what each way keeps between steps and needs on top during one."""
    cases = unique(_case_of(row) for row in rows)
    height = 0.8 + 0.3 * len(rows) + 0.4 * len(cases)
    figure = Figure((7, height), layout="constrained")
    axes = figure.subplots(len(cases), 1, squeeze=False)
    for axis, case in zip(axes[:, 0], cases, strict=True):
        chosen = {row["provider"]: row for row in rows if _case_of(row) == case}
        resident = [float(row["resident_bytes"]) / 1e9 for row in chosen.values()]
        extra = [float(row["peak_bytes"] or 0) / 1e9 for row in chosen.values()]
        axis.barh(list(chosen), resident, label="between steps")
        axis.barh(list(chosen), extra, left=resident, label="more during a step")
        axis.invert_yaxis()
        axis.set_title(case, loc="left")
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel("GB")
    axes[0, 0].legend(fontsize=8)
    return figure


def _case_of(row: Row) -> str:
    again = ", recomputed activations" if row["checkpointing"] == "True" else ""
    return f"{row['model']}, {row['layers']} layers, {row['tokens']} tokens, {row['dtype']}{again}"


def growth(rows: list[Row]) -> Figure:
    """scaling.csv: one panel per variable, the fitted exponents in its legend."""
    rows = one_dtype(rows)
    variables = unique(row["against"] for row in rows)
    columns = min(3, len(variables))
    lines = -(-len(variables) // columns)
    figure = Figure((3.4 * columns, 2.9 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(variables) :]:
        axis.set_visible(False)
    for axis, variable in zip(axes.flat, variables, strict=False):
        chosen = [row for row in rows if row["against"] == variable]
        for index, name in enumerate(unique(_name_of(row) for row in chosen)):
            curve = {int(r["value"]): r for r in chosen if _name_of(r) == name}
            last = list(curve.values())[-1]
            axis.plot(
                list(curve), [float(row["p50_ms"]) for row in curve.values()], "o-",
                color=f"C{index}", markersize=3.5, linewidth=1,
                label=f"{name}: {float(last['exponent']):.2f} (r² {float(last['r2']):.2f})",
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set(xlabel=variable, ylabel="ms")
        axis.legend(fontsize=7, title="exponent", title_fontsize=7)
    return figure


def _name_of(row: Row) -> str:
    return f"{row['of']} {row['provider']}"
