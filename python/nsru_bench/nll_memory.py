"""Resident memory of forward and backward of the NLL on a CPU; see ``bench.py``.

The providers of ``loss.py`` that need no GPU; one file with the seconds and the peak of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from nsru_bench import loss, rows
from nsru_bench.session import Session


def run(session: Session) -> None:
    loss.check(loss.PROVIDERS, loss.make_inputs(37, 1001, 64, torch.float32))
    tokens = loss.TINY_TOKENS if session.tiny else (256, 1024, 2048)
    vocabulary, width = (512, 64) if session.tiny else (loss.VOCABULARY, 512)
    if session.fits("nll_memory", 3 if session.tiny else 60):
        sizes = [(count, vocabulary, width) for count in tokens]
        measure(sizes, session.dtype, session.out / "nll_memory.csv")


def measure(sizes: Sequence[loss.Sizes], dtype: torch.dtype, out: Path) -> None:
    """Write a row for each of ``sizes`` and provider, all together."""
    columns, made = rows.run_columns("transformers"), []
    for size in sizes:
        results = {name: loss.measure_alone(name, size, dtype) for name in loss.PROVIDERS}
        nlls = [result["nll"] for result in results.values()]
        assert max(nlls) - min(nlls) <= 1e-2, f"the providers disagree on the NLL: {nlls}"
        for name, result in results.items():
            mebibytes, seconds = result["peak_bytes"] / 2**20, result["seconds"]
            print(f"{size[0]:>8}  {name:<14}{mebibytes:10.0f} MiB{seconds:10.2f} s", flush=True)
            row = {"provider": name, "dtype": rows.dtype_name(dtype)}
            row |= dict(zip("TVD", size, strict=True))
            row |= {"peak_bytes": int(result["peak_bytes"]), "seconds": round(seconds, 3)}
            made.append(row | columns)
    rows.replace(out, made)
