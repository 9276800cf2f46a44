"""The projected linear's description of itself: who serves it, what they take, how plans are
found."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from nsru_kernels.dispatch import cpu_extension, launch
from nsru_kernels.dispatch.choice import Op, Query


def _load(backend: str) -> ModuleType:
    match backend:
        case "cpu":
            from nsru_kernels.ops.linear import cpu

            return cpu
        case "triton":
            from nsru_kernels.ops.linear import triton

            return triton
        case "cuda":
            from nsru_kernels.ops.linear import cuda

            return cuda
    from nsru_kernels.ops.linear import reference

    return reference


LINEAR = Op(
    name="linear",
    callers={"linear": "nsru_linear", "linear_group": "nsru_linear_group"},
    load=_load,
    dtypes={
        "cpu": cpu_extension.KERNEL_DTYPES,
        "triton": launch.KERNEL_DTYPES,
        "cuda": frozenset((torch.bfloat16, torch.float16)),
    },
    kernels={
        "cpu": "run on one kind of Intel Xeon with AMX, up to two threads",
        "triton": launch.ON_GPUS,
        "cuda": "run on one H200 (sm_90a only)",
    },
)


def query_of_one(args: tuple) -> Query:
    """For ``explain``: the arguments of ``nsru_linear``."""
    x, *matrices = args[:3] if args else (None,)
    return _query_of_call("linear", x, [[matrix] for matrix in matrices])


def query_of_group(args: tuple) -> Query:
    """For ``explain``: the arguments of ``nsru_linear_group``."""
    x, *lists = args[:3] if args else (None,)
    return _query_of_call("linear_group", x, lists)


def _query_of_call(table: str, x: object, lists: list) -> Query:
    """By M, K, ΣN, ΣR, as ``autograd`` looks calls up."""
    if not isinstance(x, Tensor):
        return Query(table, "forward")
    shapes = [
        [getattr(tensor, "shape", torch.Size()) for tensor in tensors]
        for tensors in lists
        if isinstance(tensors, (list, tuple))
    ]
    known = len(shapes) == 2 and x.dim() and all(shape for part in shapes for shape in part)
    sizes: tuple[int, ...] = ()
    if known:
        n, r = (sum(shape[0] for shape in part) for part in shapes)
        sizes = (math.prod(x.shape[:-1]), x.shape[-1], n, r)
    return Query(table, "forward", sizes, (compute_dtype(x),))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that ``nsru_linear`` computes in for this x: its own, or autocast's."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype
    if not x.is_floating_point() or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(device)
