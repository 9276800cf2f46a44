"""Rows of results: the columns that identify a run, and the CSV files."""

from __future__ import annotations

import csv
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from nsru_kernels.environment import describe_environment

ROOT = Path(__file__).resolve().parents[2]
IN_CHECKOUT = (ROOT / "setup.py").is_file()  # else installed from a wheel
RESULTS = ROOT / "benchmarks" / "results" if IN_CHECKOUT else Path("runs")

RUN = ("commit", "device")  # columns that are the same in all rows of a file
PREFIX = "plan "  # of providers that are one backend, by one plan

Row = dict[str, str]


def run_columns(*packages: str, device: torch.device | None = None) -> dict[str, Any]:
    """Device, versions and commit of this run, the same in each of its rows."""
    environment = describe_environment()
    cpu, versions = environment["cpu"], environment["packages"]
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
        "python": environment["python"],
        **{package: versions[package] or "not installed" for package in ("torch", *packages)},
        "commit": commit(),
    }


def commit() -> str:
    """Short hash of the sources, with "-dirty" where files differ from it; NSRU_COMMIT, if set, in
    its place, for sources without git."""
    if told := os.environ.get("NSRU_COMMIT"):
        return told
    if not IN_CHECKOUT:
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return "unknown"
    return result.stdout.strip() or "unknown"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV file, which is complete after every call.

    A file holds the rows of one commit and device, so that it can become a plan table. Rows of
    another one start it anew; what was there is kept beside it, under the name of its commit.

    Raises:
        ValueError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file() or not path.stat().st_size
    if not new:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            before = next(reader, {})
            header = list(reader.fieldnames or ())
        if header != list(rows[0]):
            raise ValueError(f"{path} has other columns; move it away or choose another --out.")
        if any(before.get(name) != str(rows[0].get(name)) for name in RUN if name in before):
            _move_aside(path, "-".join(before.get(name, "") for name in RUN))
            new = True
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _move_aside(path: Path, run: str) -> None:
    kept = path.with_name(f"{path.stem}-{re.sub(r'[^A-Za-z0-9]+', '-', run)}{path.suffix}")
    if kept.exists():  # an earlier run of that commit
        kept.write_text(kept.read_text() + path.read_text().partition("\n")[2])
        path.unlink()
    else:
        path.rename(kept)


def replace(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a CSV file anew."""
    path.unlink(missing_ok=True)
    append(path, rows)
    print(f"wrote {path}")
