"""The projection in Triton: Ā = A - (A U) C Uᵀ for every adapter of a model in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from nsru_kernels.dispatch import launch
from nsru_kernels.ops.project.tables import FIELDS, Kind, Problem, Tiles, arguments, group
from nsru_kernels.ops.project.triton_kernels import project_kernel, write_table_kernel

# Small tiles: three programs share a multiprocessor's registers and hide each other's waiting, and
# 4 KiB loads in several stages keep memory busy. At most 168 registers for aligned
# operands on all three architectures; not measured.
_TILES = {"BLOCK_R": 32, "BLOCK_IN": 16, "BLOCK_OUT": 64}
_CONFIGS: dict[int, tuple[launch.Config, ...]] = dict.fromkeys(
    (80, 90, 100),
    (
        launch.Config(_TILES, num_warps=4, num_stages=6),
        launch.Config(_TILES, num_warps=4, num_stages=4),
    ),
)
_CONFIGS[86] = _CONFIGS[80][1:]  # six stages spill on sm_86
_PROGRAMS_PER_MULTIPROCESSOR = 3
# Arguments of a kernel that writes a table: 4 KiB of them, as much as every driver takes.
_WORDS_PER_WRITE = 1000


def project_many(
    as_RK: list[Tensor], bases_KQ: list[Tensor], gram_inverses_QQ: list[Tensor | None]
) -> list[Tensor]:
    """Ā_i [R_i, K_i] in float32, contiguous; in as few launches as ``tables.group`` makes.

    Raises:
        BackendUnavailable: a dtype that the kernels do not hold, float64 above all.
    """
    launch.check_dtypes("project_adapters", *as_RK, *bases_KQ)
    outputs, launches = group(as_RK, bases_KQ, gram_inverses_QQ)
    for kind, problems in launches.items():
        _launch(kind, problems)
    return outputs


def _launch(kind: Kind, problems: list[Problem]) -> None:
    adapter_RK, basis_KQ = problems[0].adapters[0], problems[0].basis
    device = adapter_RK.device

    def run(config: launch.Config) -> None:
        blocks = config.blocks
        tiles = Tiles(blocks["BLOCK_R"], blocks["BLOCK_OUT"])
        # A launch with so many arguments is slow on the host: in CUDA graph capture only.
        args = arguments(problems, tiles, write_table, values_per_write=0)
        programs = _PROGRAMS_PER_MULTIPROCESSOR * launch.multiprocessors(device)
        first_row = FIELDS * args.problems
        project_kernel[(min(args.items, programs),)](
            args.table,
            args.workspace,
            args.counters,
            adapter_RK,
            basis_KQ,
            first_row,
            args.rows,
            first_row + 2 * args.rows,
            args.items,
            FIELDS=FIELDS,
            HAS_GRAM_INVERSE=kind.has_gram_inverse,
            ALIGNED=kind.is_aligned,
            **config.options,
        )

    launch.tuned(_CONFIGS[launch.architecture(device)], ("fold", *kind), adapter_RK, run)


def write_table(table: Tensor, device: torch.device) -> Tensor:
    """``table`` on ``device``, handed over as kernel arguments: nothing on the host must stay."""
    # In halves of 32 bits: with 64 Triton would compile a kernel for each pattern of small values.
    words = table.view(torch.int32).tolist()
    words += [0] * (-len(words) % _WORDS_PER_WRITE)
    result = torch.empty(len(words), dtype=torch.int32, device=device)
    for i in range(0, len(words), _WORDS_PER_WRITE):
        write_table_kernel[(1,)](result[i:], tuple(words[i : i + _WORDS_PER_WRITE]), num_warps=1)
    return result.view(torch.int64)
