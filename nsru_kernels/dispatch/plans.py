"""Measured winners, backend and plan of an op: one JSON file per GPU, and one for CPUs with
AMX, from measurements.

    {"device": "NVIDIA H200", "torch": …, "triton": …, "commit": …,
     "linear": [{"sizes": [8192, 4096, 4096, 16], "forward": "eager expand_first",
                 "backward": "cuda kext 128x256x64_2x1_cooperative/4"}],
     "linear_group": [{"sizes": [512, 2048, 3072, 48], "forward": "cpu", "backward": "cpu"}],
     "fold": [{"sizes": [224], "fold_many": "triton"}]}

A winner is a backend, where it has several plans one of them, and where that was measured its
configuration (for CUDA with the swizzle after the slash). A call takes the nearest measured sizes,
none of which may differ by more than a factor of two; on a CPU also only with at most as many
threads as were measured ("threads"). H100 and H200, one chip with two memories, take each other's
where their own table has none, and say so. ``nsru_bench.winners`` writes the file, for a GPU in
``make gpu-check``; without one nothing is assumed.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nsru_kernels.dispatch import cpu_extension
from nsru_kernels.dispatch.config import BACKENDS

_logger = logging.getLogger("nsru_kernels")
FOLDER = Path(__file__).parents[1] / "plans"
CPU_WITH_AMX = "CPU with AMX"


# GPUs of one chip.
ALIKE = {
    "NVIDIA H100 80GB HBM3": "NVIDIA H200",
    "NVIDIA H200": "NVIDIA H100 80GB HBM3",
}


class Winner(NamedTuple):
    """The winner of a measurement."""

    backend: str
    plan: str | None


def choose(
    op: str, function: str, device: torch.device, sizes: tuple[int, ...], threads: int
) -> Winner | None:
    """The winner at the measured sizes nearest to ``sizes``; None without a measurement there, or,
    on a CPU, with as many ``threads``."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        winner = _nearest(op, function, name, sizes)
        if winner is None and name in ALIKE:
            return _nearest(op, function, ALIKE[name], sizes)
        return winner
    if cpu_extension.unavailable(device) is not None or threads > cpu_threads():
        return None
    return _nearest(op, function, CPU_WITH_AMX, sizes)


def borrowed(op: str, function: str, device: torch.device, sizes: tuple[int, ...]) -> str | None:
    """The other GPU that ``choose`` has the winner from; None where it is this one's own."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return None if _nearest(op, function, name, sizes) else ALIKE.get(name)


def cpu_threads() -> int:
    """Number of threads with which the CPUs' table was measured; 0 without one."""
    return _table(CPU_WITH_AMX).get("threads", 0)


def slug(device_name: str) -> str:
    """The file's name for a device: "NVIDIA H200" → "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def _nearest(op: str, function: str, device_name: str, sizes: tuple[int, ...]) -> Winner | None:
    near = []
    for entry in _table(device_name).get(op, ()):
        if function not in entry or len(entry["sizes"]) != len(sizes) or 0 in sizes:
            continue
        octaves = [abs(math.log2(a / b)) for a, b in zip(sizes, entry["sizes"], strict=True)]
        if max(octaves, default=0.0) <= 1.0:
            near.append((sum(octaves), entry[function]))
    if not near:
        return None
    backend, _, plan = min(near)[1].partition(" ")
    return Winner(backend, plan or None)


@functools.cache
def _table(device_name: str) -> dict[str, Any]:
    """The device's file; what is damaged in it counts as not measured, and is said once."""
    path = FOLDER / f"{slug(device_name)}.json"
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text())
        measured = {op: [e for e in entries if _valid(e, path)] for op, entries in table.items()
                    if isinstance(entries, list)}  # fmt: skip
        threads = table.get("threads")
        return measured | {"threads": threads if isinstance(threads, int) else 0}
    except (ValueError, AttributeError) as error:
        _logger.warning("%s is no plan table (%s); nothing counts as measured.", path, error)
        return {}


def _valid(entry: Any, path: Path) -> bool:
    valid = (
        isinstance(entry, dict)
        and isinstance(entry.get("sizes"), list)
        and bool(entry["sizes"])
        and all(isinstance(size, int) and 0 < size < 2**62 for size in entry["sizes"])
        and all(
            isinstance(winner, str) and winner.partition(" ")[0] in BACKENDS
            for function, winner in entry.items()
            if function != "sizes"
        )
    )
    if not valid:
        _logger.warning("%s: left out %r.", path, entry)
    return valid
