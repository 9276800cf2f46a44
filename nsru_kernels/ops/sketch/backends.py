"""The sketch update's description of itself: who serves it, and how plans are found."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from nsru_kernels.dispatch import launch
from nsru_kernels.dispatch.choice import Op, Query


def _load(backend: str) -> ModuleType:
    match backend:
        case "triton":
            from nsru_kernels.ops.sketch import triton

            return triton
        case "cuda":
            from nsru_kernels.ops.sketch import cuda

            return cuda
    from nsru_kernels.ops.sketch import reference  # "cpu" too: it has no kernel of its own

    return reference


SKETCH = Op(
    name="sketch",
    callers={"sketch": "RetainSketch.update"},
    load=_load,
    dtypes={"triton": launch.KERNEL_DTYPES, "cuda": launch.KERNEL_DTYPES},
    kernels={
        "triton": launch.NOT_RUN,
        "cuda": "compiled for sm_80 and sm_90a and emulated, not run on a GPU",
    },
)


def query(x_MK: Tensor, width: int, accumulator: torch.dtype) -> Query:
    """By M, K, L; the dtypes are those of x and of the accumulators."""
    sizes = (*x_MK.shape, width)
    return Query("sketch", "update_sketch", sizes, (x_MK.dtype, accumulator))


def query_of_call(args: tuple) -> Query:
    """For ``explain``: a RetainSketch and the arguments of its ``update``."""
    sketch, x = args[:2] if len(args) > 1 else (None, None)
    if isinstance(x, Tensor) and x.dim() and hasattr(sketch, "width"):
        flat = x.new_empty(math.prod(x.shape[:-1]), x.shape[-1], device="meta")
        return query(flat, sketch.width, torch.float32)
    return Query("sketch", "update_sketch")
