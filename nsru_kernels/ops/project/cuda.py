"""The grouped projection with the CUDA extension: Ā = A - (A U) C Uᵀ for every adapter of a model
in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from nsru_kernels.dispatch import extension, launch
from nsru_kernels.dispatch.extension import DTYPES
from nsru_kernels.ops.project.tables import Kind, Problem, Tiles, arguments, group

# As compiled: csrc/host/project_plan.h
_TILES = Tiles(rows=32, out=64)
_VALUES_PER_WRITE = 4000


def project_many(
    as_RK: list[Tensor], bases_KQ: list[Tensor], gram_inverses_QQ: list[Tensor | None]
) -> list[Tensor]:
    """Ā_i [R_i, K_i] in float32, contiguous; in as few launches as ``tables.group`` makes.

    Raises:
        BackendUnavailable: a dtype that the kernels do not hold, float64 above all.
    """
    launch.check_dtypes("project_adapters", *as_RK, *bases_KQ, backend="cuda")
    outputs, launches = group(as_RK, bases_KQ, gram_inverses_QQ)
    for kind, problems in launches.items():
        _launch(kind, problems)
    return outputs


def _launch(kind: Kind, problems: list[Problem]) -> None:
    with torch.cuda.device_of(problems[0].basis):  # whose stream may be capturing
        args = arguments(problems, _TILES, write_table, _VALUES_PER_WRITE)
        extension.launch(
            "project",
            args.table,
            table=args.table.data_ptr(),
            table_size=args.table.numel(),
            problems=args.problems,
            rows=args.rows,
            items=args.items,
            counters=args.counters.data_ptr(),
            counters_size=args.counters.numel(),
            workspace=args.workspace.data_ptr(),
            workspace_bytes=args.workspace.nbytes,
            adapter=DTYPES[kind.adapter_dtype],
            basis=DTYPES[kind.basis_dtype],
            has_gram_inverse=kind.has_gram_inverse,
            aligned=kind.is_aligned,
        )


def write_table(table: Tensor, device: torch.device) -> Tensor:
    """``table`` on ``device``, handed over as kernel arguments: nothing on the host must stay."""
    result = torch.empty(table.shape, dtype=torch.int64, device=device)
    extension.launch(
        "write_table",
        result,
        values=table.data_ptr(),
        size=table.numel(),
        table=result.data_ptr(),
    )
    return result
