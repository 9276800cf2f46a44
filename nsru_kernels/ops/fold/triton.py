"""The grouped fold in Triton: Ā = A - (A U) C Uᵀ for every adapter of a model in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from nsru_kernels.ops import launch
from nsru_kernels.ops.fold.tables import (
    FIELDS,
    Problem,
    Tiles,
    aligned,
    describe,
    schedule,
)
from nsru_kernels.ops.fold.triton_kernels import fold_kernel, write_table_kernel

# Small tiles: three programs share a multiprocessor's registers and hide each other's waiting, and
# 4 KiB loads in several stages keep memory busy. At most 168 registers for aligned
# operands on all three architectures; not measured.
_TILES = {"BLOCK_R": 32, "BLOCK_IN": 16, "BLOCK_OUT": 64}
_CONFIGS = dict.fromkeys(
    (80, 90, 100),
    (
        launch.Config(_TILES, num_warps=4, num_stages=6),
        launch.Config(_TILES, num_warps=4, num_stages=4),
    ),
)
_PROGRAMS_PER_MULTIPROCESSOR = 3
# Bytes of bases between the two uses of a basis: more than what all programs have under way at a
# time (64 KiB each), and with the longest basis of an 8B model still less than L2.
_LAG = 24 << 20
_VALUES_PER_WRITE = 8


def fold_many(
    as_RK: list[Tensor], bases_KQ: list[Tensor], cores_QQ: list[Tensor | None]
) -> list[Tensor]:
    """Ā_i [R_i, K_i] in float32, contiguous.

    One launch for each pair of adapter and basis dtypes; a second one where a few problems are not
    aligned to 16 bytes and would slow down the others.

    Raises:
        BackendUnavailable: a dtype that the kernels do not hold, float64 above all.
    """
    launch.check_dtypes("project_adapters", *as_RK, *bases_KQ)
    outputs: list[Tensor] = []
    problems: dict[tuple, Problem] = {}
    for a_RK, basis_KQ, core_QQ in zip(as_RK, bases_KQ, cores_QQ, strict=True):
        if not a_RK.numel() or not basis_KQ.shape[1]:
            outputs.append(a_RK.to(torch.float32, copy=True).contiguous())
            continue
        output_RK = torch.empty(a_RK.shape, dtype=torch.float32, device=a_RK.device)
        outputs.append(output_RK)
        key = (a_RK.dtype, *_identity(basis_KQ), *_identity(core_QQ))
        if key not in problems:
            core_QQ = None if core_QQ is None else core_QQ.contiguous()
            problems[key] = Problem(basis_KQ, core_QQ, [], [])
        problems[key].adapters.append(a_RK if a_RK.stride(1) == 1 else a_RK.contiguous())
        problems[key].outputs.append(output_RK)

    launches: dict[tuple, list[Problem]] = {}
    for problem in problems.values():
        kind = (
            *(problem.adapters[0].dtype, problem.basis.dtype),
            *(problem.core is not None, aligned(problem)),
        )
        launches.setdefault(kind, []).append(problem)
    for kind, group in launches.items():
        _launch(group, *kind)
    return outputs


def _identity(tensor: Tensor | None) -> tuple:
    if tensor is None:
        return (None,)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _launch(
    problems: list[Problem],
    adapter_dtype: torch.dtype,
    basis_dtype: torch.dtype,
    has_core: bool,
    is_aligned: bool,
) -> None:
    adapter_RK, basis_KQ = problems[0].adapters[0], problems[0].basis
    device = adapter_RK.device

    def run(config: launch.Config) -> None:
        blocks = config.blocks
        tiles = Tiles(blocks["BLOCK_R"], blocks["BLOCK_OUT"])
        order = schedule(tuple(problem.size for problem in problems), tiles, _LAG)
        table, first_row, n_rows = describe(problems, order)
        n_items = order.items.numel()
        programs = _PROGRAMS_PER_MULTIPROCESSOR * launch.multiprocessors(device)
        fold_kernel[(min(n_items, programs),)](
            to_device(table, device),
            torch.empty(order.workspace_size, dtype=torch.float32, device=device),
            torch.zeros(order.counter_size, dtype=torch.int32, device=device),
            adapter_RK,
            basis_KQ,
            first_row,
            n_rows,
            first_row + 2 * n_rows,
            n_items,
            FIELDS=FIELDS,
            HAS_CORE=has_core,
            ALIGNED=is_aligned,
            **config.options,
        )

    key = ("fold", adapter_dtype, basis_dtype, has_core, is_aligned)
    launch.tuned(_CONFIGS[launch.architecture(device)], key, adapter_RK, run)


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A copy of ``table`` on ``device`` that a CUDA graph, too, can make again at every replay."""
    if device.type != "cuda":
        return table.to(device)
    if torch.cuda.is_current_stream_capturing():
        return write_table(table, device)
    return table.pin_memory().to(device, non_blocking=True)


def write_table(table: Tensor, device: torch.device) -> Tensor:
    """``table`` on ``device``, handed over as kernel arguments: nothing on the host must stay."""
    values = table.tolist()
    values += [0] * (-len(values) % _VALUES_PER_WRITE)
    result = torch.empty(len(values), dtype=torch.int64, device=device)
    for i in range(0, len(values), _VALUES_PER_WRITE):
        write_table_kernel[(1,)](result[i:], *values[i : i + _VALUES_PER_WRITE])
    return result
