"""The projection in Triton: Ā = A - (A U) C Uᵀ for every adapter of a model in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from nsru_kernels.dispatch import launch
from nsru_kernels.dispatch.launch import Config
from nsru_kernels.ops.project.tables import FIELDS, Group, Tiles, launches
from nsru_kernels.ops.project.triton_kernels import project_kernel, write_table_kernel

# Small tiles: three programs share a multiprocessor's registers and hide each other's waiting, and
# 4 KiB loads in several stages keep memory busy. At most 168 registers for aligned
# operands on all three architectures; not measured.
_TILES = {"BLOCK_R": 32, "BLOCK_IN": 16, "BLOCK_OUT": 64}
_CONFIGS: dict[int, tuple[Config, ...]] = dict.fromkeys(
    (80, 90, 100),
    (
        Config(_TILES, num_warps=4, num_stages=6),
        Config(_TILES, num_warps=4, num_stages=4),
    ),
)
_CONFIGS[86] = _CONFIGS[80][1:]  # six stages spill on sm_86
_PROGRAMS_PER_MULTIPROCESSOR = 3
# Arguments of a kernel that writes a table: 4 KiB of them, as much as every driver takes.
_WORDS_PER_WRITE = 1000


def project_many(
    as_RK: list[Tensor], bases_KQ: list[Tensor], gram_inverses_QQ: list[Tensor | None]
) -> list[Tensor]:
    """Ā_i [R_i, K_i] in float32, contiguous; in as few launches as ``tables.launches`` makes.

    Raises:
        BackendUnavailable: a dtype that the kernels do not hold, float64 above all.
    """
    outputs = [torch.empty(a.shape, dtype=torch.float32, device=a.device) for a in as_RK]
    operands = zip(outputs, ([a] for a in as_RK), bases_KQ, gram_inverses_QQ, strict=True)
    project_into([Group(*one) for one in operands])
    return outputs


def project_into(groups: list[Group]) -> None:
    """The same into the outputs of groups, rounded once to their dtype."""
    wanted = []
    for output_RK, adapters, basis_KQ, core_QQ in groups:
        launch.check_dtypes("project_adapters", output_RK, basis_KQ, *adapters)
        if not basis_KQ.shape[1] or not output_RK.numel():
            torch.cat(list(adapters), out=output_RK)
            continue
        rows = [a if a.stride(1) == 1 else a.contiguous() for a in adapters]
        core_QQ = None if core_QQ is None else core_QQ.contiguous()
        wanted.append(Group(output_RK, rows, basis_KQ, core_QQ))
    if not wanted:
        return
    like, device = wanted[0].adapters[0], wanted[0].basis.device
    programs = _PROGRAMS_PER_MULTIPROCESSOR * launch.multiprocessors(device)

    def run(config: Config) -> None:
        tiles = Tiles(config.blocks["BLOCK_R"], config.blocks["BLOCK_OUT"])
        for known, args in launches(wanted, tiles, write_table):
            project_kernel[(min(known.item_count, programs),)](
                known.problems,
                args.rows,
                known.items,
                args.workspace,
                args.counters,
                *known.like,
                known.offsets.shape[1],
                known.item_count,
                FIELDS=FIELDS,
                HAS_GRAM_INVERSE=known.kind.has_gram_inverse,
                ALIGNED=known.kind.is_aligned,
                **config.options,
            )

    key = {(g.adapters[0].dtype, *g.identity[:1], g.basis.dtype) for g in wanted}
    launch.tuned(_CONFIGS[launch.architecture(device)], ("fold", *key), like, run)


def write_table(table: Tensor, device: torch.device) -> Tensor:
    """``table`` on ``device``, handed over as kernel arguments: nothing on the host must stay."""
    # In halves of 32 bits: with 64 Triton would compile a kernel for each pattern of small values.
    words = table.view(torch.int32).tolist()
    words += [0] * (-len(words) % _WORDS_PER_WRITE)
    result = torch.empty(len(words), dtype=torch.int32, device=device)
    for i in range(0, len(words), _WORDS_PER_WRITE):
        write_table_kernel[(1,)](result[i:], tuple(words[i : i + _WORDS_PER_WRITE]), num_warps=1)
    return result.view(torch.int64)
