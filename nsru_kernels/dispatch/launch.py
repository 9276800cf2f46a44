"""Common parts of Triton launchers: where Triton can run, configs per architecture, padding.

A kernel's configs are a small fixed table, one row per architecture, the first entry the default.
``NSRU_AUTOTUNE=1`` times all entries of the row once per key and keeps the fastest; keys hold no
token count, so a new batch size neither tunes nor compiles anything.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from nsru_kernels.dispatch.config import BackendUnavailable, autotune, interpreting
from nsru_kernels.dispatch.precision import float32_precision

Result = TypeVar("Result")

ON_GPUS = "run on one H200; for sm_80, 86, 89, 100 and 120 compiled and interpreted, not run"
KERNEL_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
# What the config tables were compiled and checked for: (major, minor) → row. Consumer cards, with
# 99 KiB of shared memory a block and neither wgmma nor tcgen05, have one row.
ROWS = {(8, 0): 80, (8, 6): 86, (8, 9): 86, (9, 0): 90, (10, 0): 100, (10, 3): 100, (12, 0): 86}
ARCHITECTURES = tuple(sorted(set(ROWS.values())))
# The least M, N and K of a tensor-core instruction that Triton uses for 16-bit operands.
LEAST_TILE = 16


class Config(NamedTuple):
    """Tile sizes by their names in the kernel, and how it is compiled."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a kernel launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


def unavailable(device: torch.device) -> str | None:
    """Reason and remedy where Triton kernels cannot run on ``device``; None where they can."""
    if not _installed("triton"):
        return "Triton is not installed. `pip install triton`, or use backend='eager'."
    if device.type == "meta":
        return None
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return "Triton kernels need tensors on a CUDA device. Use backend='eager'."
    if not _installed("triton.tools.tensor_descriptor"):
        return "Triton 3.4 or newer is needed, as of PyTorch 2.8. Update, or use backend='eager'."
    if device.type == "cpu":
        return None
    if torch.version.hip:
        return "Triton kernels are written for NVIDIA GPUs; this PyTorch is for ROCm."
    capability = torch.cuda.get_device_capability(device)
    if capability not in ROWS:
        known = ", ".join(f"{major}.{minor}" for major, minor in ROWS)
        return (
            f"kernels are compiled and checked for compute capability {known} (this GPU: "
            f"{capability[0]}.{capability[1]}). Use backend='eager'."
        )
    return None


@functools.cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def architecture(device: torch.device) -> int:
    """The row of a config table that serves ``device``, one of ARCHITECTURES."""
    return ROWS[torch.cuda.get_device_capability(device)] if device.type == "cuda" else 80


def capturing(device: torch.device) -> bool:
    """True while a CUDA graph is being captured on the current stream of ``device``."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def multiprocessors(device: torch.device) -> int:
    """Number of programs that run side by side, for choosing splits and persistent grids."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def tuned(
    configs: Sequence[Config], key: tuple, tensor: Tensor, run: Callable[[Config], Result]
) -> Result:
    """``run`` with the config for this call, on the device of ``tensor``.

    Args:
        configs: the table's row for this architecture, best guess first.
        key: what the choice may depend on besides the device: kernel, dtype and frozen sizes.
        tensor: any operand.
        run: allocates outputs and launches; safe to repeat.
    """
    device = tensor.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if len(configs) == 1 or not autotune() or device.type != "cuda":
            return run(configs[0])
        full_key = (device, *key)
        if full_key not in _fastest and not capturing(device):
            _fastest[full_key] = _time(configs, run)
        return run(_fastest.get(full_key, configs[0]))


_fastest: dict[tuple, Config] = {}


def _time(configs: Sequence[Config], run: Callable[[Config], object]) -> Config:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    def milliseconds(config: Config) -> float:
        try:
            return do_bench(lambda: run(config), return_mode="median")
        except OutOfResources:
            return float("inf")

    return min(configs, key=milliseconds)


def padded(size: int) -> int:
    """``size`` rounded up to a tile that tensor cores take: a power of two, at least 16."""
    return max(LEAST_TILE, 1 << (size - 1).bit_length())


def in_memory(values: Any) -> Any:
    """Tensors, in lists too, whose memory holds their values: lazy negations and zeros do not."""
    if isinstance(values, Tensor):
        lazy_zeros = values._is_zerotensor()  # of forward-mode differentiation
        return torch.zeros_like(values) if lazy_zeros else values.resolve_neg()
    if isinstance(values, (list, tuple)):
        return [in_memory(value) for value in values]
    return values


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: TF32 for float32 only where the user allowed it."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if float32_precision("cuda") == "tf32" else "tf32x3"


def check_dtypes(op: str, *tensors: Tensor, backend: str = "triton") -> None:
    """Refuse what the kernels cannot hold. Raises BackendUnavailable."""
    for tensor in tensors:
        if tensor.dtype not in KERNEL_DTYPES:
            raise BackendUnavailable(
                f"backend={backend!r} cannot serve {op}: kernels take float32, bf16 and fp16, got "
                f"{tensor.dtype}. Use backend='eager'."
            )
