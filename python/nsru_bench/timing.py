"""Milliseconds of several ways to do the same thing, interleaved in one run.

A *call* is a list of functions without arguments that do the same work on different inputs. On a
CPU each round runs one of them. On a GPU all of them are captured into one CUDA graph, so that a
replay sees inputs that have left the caches and no gaps between launches; a round is one replay,
divided by the number of inputs. What cannot be captured is launched and timed by events instead,
and the reason printed.

A backward runs on the stream of its forward, and the default stream cannot be captured: what a call
goes back through has to be made inside ``side_stream``, where all calls are captured and timed.
"""

from __future__ import annotations

import contextlib
import functools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

Call = Sequence[Callable[[], object]]


class Timing(NamedTuple):
    """Milliseconds per call in every round, how they were taken, and the peak of one call."""

    ms: list[float]
    method: str  # "graph", "events" or "clock"
    peak_bytes: int | None  # above what was allocated before the call; None on a CPU

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    def quantiles(self) -> dict[str, float]:
        """p20, p50 and p80 in milliseconds."""
        ms = self.ms if len(self.ms) > 1 else self.ms * 2
        p20, _, _, p80 = statistics.quantiles(ms, n=5, method="inclusive")
        values = {"p20_ms": p20, "p50_ms": self.median, "p80_ms": p80}
        return {name: round(value, 6) for name, value in values.items()}


def interleaved(
    calls: Mapping[str, Call],
    device: torch.device,
    rounds: int,
    warmup: int = 3,
    *,
    capture: bool = True,
) -> dict[str, Timing]:
    """Time every call; each round runs all of them in a new random order.

    Args:
        calls: name → call.
        device: whose clock counts.
        rounds: timed rounds.
        warmup: rounds before them.
        capture: whether to try a CUDA graph; not for what waits for the device in between.
    """
    with side_stream(device):
        peaks = {name: _peak_bytes(call, device) for name, call in calls.items()}
        timers = {name: _timer(name, call, device, capture) for name, call in calls.items()}
        shuffled, names = random.Random(0), list(calls)
        ms: dict[str, list[float]] = {name: [] for name in names}
        for round_ in range(warmup + rounds):
            shuffled.shuffle(names)
            for name in names:
                taken = timers[name][0](round_)
                if round_ >= warmup:
                    ms[name].append(taken)
    return {name: Timing(ms[name], timers[name][1], peaks[name]) for name in calls}


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """In the block the device's one side stream is current, in order with what is around it."""
    if device.type != "cuda":
        yield
        return
    around, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(around)
    with torch.cuda.stream(side):
        yield
    around.wait_stream(side)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _timer(
    name: str, call: Call, device: torch.device, capture: bool
) -> tuple[Callable[[int], float], str]:
    """round → milliseconds of a call in it, and how they are taken."""
    if device.type != "cuda":
        return lambda round_: _clock(call[round_ % len(call)]), "clock"
    graph = _capture(name, call, device) if capture else None
    if graph is None:
        return lambda _: _events(lambda: [run() for run in call], len(call)), "events"
    return lambda _: _events(graph.replay, len(call)), "graph"


def _clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _events(run: Callable[[], object], count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def _capture(name: str, call: Call, device: torch.device) -> torch.cuda.CUDAGraph | None:
    """All of ``call`` in one graph; None where something in it cannot be captured."""
    for _ in range(2):  # compile, autotune, let libraries allocate
        for run in call:
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=_side_stream(device)):
            for run in call:
                run()
    except RuntimeError as error:
        print(f"{name} is timed by events, it cannot be captured: {error}", flush=True)
        torch.cuda.synchronize()
        # A capture that fails does not tell the allocator that it is over.
        with contextlib.suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index or 0, graph.pool())
        return None
    return graph


def _peak_bytes(call: Call, device: torch.device) -> int | None:
    call[0]()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call[0]()
    return torch.cuda.max_memory_allocated(device) - before


def copies_beyond_caches(device: torch.device, moved: int) -> int:
    """Number of inputs of ``moved`` bytes that a call rotates over, none still in a cache."""
    return 2 if device.type == "cpu" else max(2, min(16, 2**28 // moved))
