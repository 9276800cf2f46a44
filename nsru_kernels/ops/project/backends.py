"""The projection's description of itself: who serves it, and how plans are found."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from nsru_kernels.dispatch import launch
from nsru_kernels.dispatch.choice import Op, Query


def _load(backend: str) -> ModuleType:
    match backend:
        case "cpu":
            from nsru_kernels.ops.project import cpu

            return cpu
        case "triton" | "cuda":
            from nsru_kernels.ops.project import triton

            return triton
    from nsru_kernels.ops.project import reference

    return reference


PROJECT = Op(
    name="project",
    callers={"fold": "project_adapter"},
    load=_load,
    dtypes={
        "cpu": frozenset((torch.float32,)),
        "triton": launch.KERNEL_DTYPES,
        "cuda": launch.KERNEL_DTYPES,
    },
    kernels={
        "cpu": "run on one kind of Intel Xeon with AMX, up to two threads",
        "triton": launch.ON_GPUS,
        "cuda": f"Triton's serve: {launch.ON_GPUS}",
    },
    cuda_by_triton=True,
)


def query(as_RK: list[Tensor], bases_KQ: list[Tensor]) -> Query:
    """By the number of adapters; the dtypes are those of the adapters and the bases."""
    if len(as_RK) == 1:
        return Query("fold", "fold_many", (1,), (as_RK[0].dtype, bases_KQ[0].dtype))
    dtypes = tuple(sorted({t.dtype for t in (*as_RK, *bases_KQ)}, key=str))
    return Query("fold", "fold_many", (len(as_RK),), dtypes)


def query_of_call(args: tuple) -> Query:
    """For ``explain``: the arguments of ``project_adapter`` or ``project_adapters``."""
    lists = [arg if isinstance(arg, (list, tuple)) else [arg] for arg in args[:2]]
    tensors = [[t for t in part if isinstance(t, Tensor)] for part in lists]
    if len(tensors) == 2 and all(tensors):
        return query(*tensors)._replace(sizes=(len(tensors[1]),))
    dtypes = tuple({t.dtype for part in tensors for t in part})
    return Query("fold", "fold_many", (), dtypes)
