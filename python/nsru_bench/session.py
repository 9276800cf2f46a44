"""One benchmark run: where it runs, how large, how long it may take, and where its rows go."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nsru_bench import rows, timing


@dataclass(frozen=True)
class Limits:
    """Limits of this device, measured in this run: the denominators of every floor."""

    flops: float  # FLOP/s of a large matrix product in the dtype of the run
    bytes_per_second: float  # read plus written, of a large copy

    def floor_ms(self, flop: float, moved: float) -> float:
        """Milliseconds that ``flop`` and ``moved`` bytes take at least, perfectly overlapped."""
        return 1e3 * max(flop / self.flops, moved / self.bytes_per_second)


@dataclass
class Session:
    """Shared by all benchmarks of a run.

    Attributes:
        device: CPU or one GPU.
        dtype: of activations and frozen weights.
        tiny: sizes for a walk through the code, not for figures.
        rounds: timed rounds of every call.
        seconds: budget of the whole run; None for no limit.
        out: folder of the CSV files.
        quick: only the sizes and peers that decide which plan wins.
    """

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    tiny: bool = False
    rounds: int = 20
    seconds: float | None = None
    out: Path = rows.RESULTS
    quick: bool = False
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.until = float("inf") if self.seconds is None else self.started + self.seconds
        self.columns = rows.run_columns("triton", "transformers", "peft", device=self.device)
        self.limits = self._measure_limits()

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def left(self) -> float:
        """Seconds that are left to the op that runs."""
        return self.until - time.monotonic()

    def grant(self, share: float) -> None:
        """Let the next op take this share of what is left of the whole budget."""
        if self.seconds is not None:
            now = time.monotonic()
            self.until = now + share * (self.started + self.seconds - now)

    def fits(self, what: str, seconds: float) -> bool:
        """True where the budget has room for about ``seconds`` more; remembers what had none."""
        if self.left() >= (min(seconds, 3) if self.quick else seconds):  # estimates are generous
            return True
        self.skipped.append(what)
        print(f"skipped {what}: {self.left():.0f} s left", flush=True)
        return False

    def fail(self, what: str, error: Exception) -> None:
        """Remember what is wrong and go on; the run ends with a non-zero exit status."""
        self.failed.append(f"{what}: {type(error).__name__}: {error}")
        print(f"FAILED {self.failed[-1]}", flush=True)

    def time(
        self, calls: Mapping[str, timing.Call], *, capture: bool = True
    ) -> dict[str, timing.Timing]:
        """Interleaved milliseconds of every call on this device; see ``timing.interleaved``."""
        warmup = 1 if self.tiny else 3
        return timing.interleaved(calls, self.device, self.rounds, warmup, capture=capture)

    def time_few_rounds(
        self, calls: Mapping[str, timing.Call], rounds: int = 3
    ) -> dict[str, timing.Timing]:
        """As ``time``, for calls of seconds; the row says how many rounds there were."""
        rounds = min(self.rounds, rounds)
        return timing.interleaved(calls, self.device, rounds, warmup=1, capture=False)

    def record(
        self, op: str, timings: Mapping[str, timing.Timing], shape: Mapping[str, Any], **more: Any
    ) -> None:
        """Append one row per provider to ``<op>.csv`` and print it; see ``make_rows``."""
        rows.append(self.out / f"{op}.csv", self.make_rows(op, timings, shape, **more))

    def make_rows(
        self,
        op: str,
        timings: Mapping[str, timing.Timing],
        shape: Mapping[str, Any],
        *,
        flop: float,
        moved: float,
        base: str | None = None,
        plans: Mapping[str, str] | None = None,
        each: Mapping[str, Mapping[str, Any]] | None = None,
        run: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """One row per provider, which is printed too.

        Args:
            op: what is measured.
            timings: provider → timing.
            shape: columns that say what was computed.
            flop: useful FLOP of a call, the same for every provider.
            moved: bytes that must move at least.
            base: the provider that ratios refer to.
            plans: provider → plan, where one has several.
            each: provider → more columns, the same ones for every provider.
            run: what of this run's columns is otherwise for this op.
        """
        made = []
        for provider, result in timings.items():
            seconds = result.median / 1e3
            ratio = round(result.median / timings[base].median, 4) if base else ""
            row = {
                "op": op,
                "provider": provider,
                "plan": (plans or {}).get(provider, ""),
                **shape,
                "dtype": rows.dtype_name(self.dtype),
                **result.quantiles(),
                "ratio": ratio,
                "base": base or "",
                "floor_ms": round(self.limits.floor_ms(flop, moved), 6),
                "tflops": round(flop / seconds / 1e12, 4),
                "gbytes_per_s": round(moved / seconds / 1e9, 3),
                "peak_bytes": "" if result.peak_bytes is None else result.peak_bytes,
                "timing": result.method,
                "rounds": len(result.ms),
                "tiny": self.tiny,
                **(each or {}).get(provider, {}),
                **self.columns,
                **(run or {}),
            }
            made.append(row)
            sizes = " ".join(f"{name}={value}" for name, value in shape.items())
            name = f"{provider} {row['plan']}".strip()
            times = f"{row['p50_ms']:10.4f} ms" + (f"{ratio:8.3f} × {base}" if base else "")
            print(f"{op:<10}{sizes:<44} {name:<34}{times}", flush=True)
        return made

    def _measure_limits(self) -> Limits:
        """The fastest square matrix product and copy, by the same timer as everything else."""
        sizes = (256,) if self.tiny else (2048, 4096) if self.on_cpu else (4096, 8192)
        count = 2**20 if self.tiny else 2**25 if self.on_cpu else 2**28
        a, b = (
            torch.randn(sizes[-1], sizes[-1], device=self.device, dtype=self.dtype)
            for _ in range(2)
        )
        products = {f"{n}": [partial(torch.mm, a[:n, :n], b[:n, :n])] for n in sizes}
        source = torch.randn(count, device=self.device)
        target = torch.empty_like(source)
        # By a kernel: a GPU's own copy of memory is slower.
        timings = self.time({**products, "copy": [lambda: torch.neg(source, out=target)]})
        return Limits(
            max(2 * n**3 / (min(timings[f"{n}"].ms) / 1e3) for n in sizes),
            2 * source.nbytes / (min(timings["copy"].ms) / 1e3),
        )
