"""What every benchmark shares: interleaved timing, the columns that identify a run, CSV rows."""

from __future__ import annotations

import csv
import importlib.metadata
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nsru_kernels.environment import describe_environment

ROOT = Path(__file__).resolve().parents[1]
IN_CHECKOUT = (ROOT / "setup.py").is_file()  # else installed from a wheel, as nsru_bench
RESULTS = ROOT / "benchmarks" / "results" if IN_CHECKOUT else Path("runs")


def interleave(
    calls: dict[str, tuple[Callable[[], None], Callable[[], None]]], rounds: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of every call in every round; each round runs all of them in a new random order.

    Args:
        calls: name -> (prepare, run); only ``run`` is timed.
        rounds: timed rounds.
        warmup: rounds before them.
    """
    shuffled = random.Random(0)
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(warmup + rounds):
        shuffled.shuffle(names)
        for name in names:
            prepare, run = calls[name]
            prepare()
            start = time.perf_counter()
            run()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def quantiles_ms(seconds: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds."""
    p20, _, _, p80 = statistics.quantiles(seconds, n=5)
    values = {"p20_ms": p20, "p50_ms": statistics.median(seconds), "p80_ms": p80}
    return {name: round(1e3 * value, 4) for name, value in values.items()}


def report_ratios(
    seconds: dict[str, list[float]], describe: Callable[[float], dict[str, Any]], **columns: Any
) -> list[dict[str, Any]]:
    """Print the providers of an interleaved run against "frozen"; one CSV row for each.

    Args:
        seconds: from ``interleave``.
        describe: median seconds -> further columns, after the ratio.
        columns: what was computed, before the times.
    """
    frozen = statistics.median(seconds["frozen"])
    identity, rows = run_columns("peft"), []
    print(f"{'provider':<30}{'p20 ms':>9}{'p50 ms':>9}{'p80 ms':>9}{'/ frozen':>10}")
    for name, values in seconds.items():
        median, ms = statistics.median(values), quantiles_ms(values)
        ratio = median / frozen
        print(f"{name:<30}" + "".join(f"{value:9.3f}" for value in ms.values()) + f"{ratio:10.3f}")
        row = {"provider": name, "pass": "forward+backward", **columns, **ms}
        row |= {"ratio_to_frozen": round(ratio, 4), **describe(median), "rounds": len(values)}
        rows.append(row | identity)
    return rows


def report_target(seconds: dict[str, list[float]], name: str, base: str, bar: float) -> None:
    """Print the ratio of two providers' medians and whether it is at most ``bar``."""
    ratio = statistics.median(seconds[name]) / statistics.median(seconds[base])
    verdict = "met" if ratio <= bar else "missed"
    print(f"{name} / {base}: {ratio:.3f} (target {bar:.2f}: {verdict})")


def run_columns(*packages: str, device: torch.device | None = None) -> dict[str, Any]:
    """Device, versions and commit of this run, the same in each of its rows."""
    cpu = describe_environment()["cpu"]
    columns = {
        "device": f"{cpu['model']} ({cpu['cores']} cores)",
        "capability": " ".join([cpu["capability"], *cpu["flags"]]),
        "threads": cpu["threads"],
    }
    if device is not None and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        columns["device"] = torch.cuda.get_device_name(device)
        columns["capability"] = f"{major}.{minor}"
    return {
        **columns,
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", *packages)},
        "commit": commit(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Short hash of the sources, with "-dirty" where files differ from it."""
    if not IN_CHECKOUT:
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, in float64."""
    reference = reference.double()
    return ((value.double() - reference).norm() / reference.norm()).item()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace ``path`` by a CSV of ``rows``, which share their columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")
