"""Peak memory while a block runs."""

from __future__ import annotations

import threading

import torch

_INTERVAL_SECONDS = 0.02


class PeakMemory:
    """Peak bytes in a ``with`` block: allocated on a GPU, or resident in RAM (sampled) on a CPU.

    Examples:
        >>> with PeakMemory(torch.device("cpu")) as peak:
        ...     x = torch.ones(10)
        >>> peak.bytes > 0
        True
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._sample()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._thread is None:
            self.bytes = torch.cuda.max_memory_allocated(self.device)
            return
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL_SECONDS):
            self._sample()

    def _sample(self) -> None:
        import psutil

        self.bytes = max(self.bytes, psutil.Process().memory_info().rss)
