"""Launchers of the products that the projected linears are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nsru_kernels.dispatch import launch
from nsru_kernels.dispatch.launch import Config
from nsru_kernels.ops.linear import triton_gemm_kernels as gemm_kernels
from nsru_kernels.ops.linear import triton_narrow_kernels as narrow_kernels

MAX_BLOCK_R = 64  # ranks of one block; larger ones take several
MAX_STORED = 128  # columns of a tile that TMA stores at a time
SOURCES = 3  # linears whose dX one launch can sum


def _tiles(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}, warps, stages)


def _narrow(m: int, c: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_C": c}, warps, stages)


# kernel → architecture → configs, the first one the default: tiles that compile without spills and
# keep several loads in flight. Timed on an H200 only, where a GROUP_M of 4 or 16 changed nothing.
CONFIGS: dict[str, dict[int, tuple[Config, ...]]] = {
    "kext": {
        80: (_tiles(128, 128, 64, 8, 3), _tiles(128, 256, 32, 8, 3)),
        86: (_tiles(128, 64, 32, 8, 4), _tiles(64, 64, 64, 8, 3)),
        90: (_tiles(128, 256, 64, 8, 3), _tiles(128, 128, 64, 8, 4)),
        100: (_tiles(128, 256, 64, 8, 3), _tiles(128, 128, 64, 8, 4)),
    },
    "shrink": {
        80: (_narrow(64, 128, 4, 4), _narrow(128, 64, 8, 4)),
        86: (_narrow(64, 64, 8, 4), _narrow(128, 64, 8, 4)),
        90: (_narrow(64, 128, 4, 4), _narrow(128, 64, 8, 4)),
        100: (_narrow(64, 64, 4, 4), _narrow(32, 64, 4, 4)),
    },
    "columns": {
        80: (_narrow(64, 128, 8, 3), _narrow(32, 128, 4, 3)),
        86: (_narrow(64, 128, 8, 2), _narrow(64, 64, 8, 3)),
        90: (_narrow(64, 256, 8, 3), _narrow(32, 512, 8, 3), _narrow(64, 128, 8, 3)),
        100: (_narrow(64, 256, 8, 3), _narrow(64, 128, 8, 3)),
    },
}
# float32 needs three products for one, and rows that do not start at a multiple of 16 bytes are
# loaded element by element: both want registers.
SMALL: dict[str, Config] = {
    "kext": _tiles(64, 64, 32, 4, 3),
    "shrink": _narrow(32, 32, 4, 3),
    "columns": _narrow(32, 32, 4, 3),
}
# The others spill on sm_86.
SMALL_86 = SMALL | {"kext": _tiles(32, 64, 32, 4, 3), "shrink": _narrow(32, 32, 8, 3)}


def shrink(
    x_MC: Tensor,
    v_CR: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    scaling: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """scaling · drop(X) V [M, R] in X's dtype, into ``out`` where given. V may have any strides."""
    (m, c), r = x_MC.shape, v_CR.shape[1]
    out_MR = x_MC.new_empty(m, r) if out is None else out
    if not m or not c:
        return out_MR.zero_()
    block_r = min(launch.padded(r), MAX_BLOCK_R)

    def run(config: Config) -> Tensor:
        block_m, block_c = config.blocks["BLOCK_M"], config.blocks["BLOCK_C"]
        blocks = triton.cdiv(m, block_m), triton.cdiv(r, block_r)
        splits = _splits(x_MC, blocks[0] * blocks[1], triton.cdiv(c, block_c), least=4)
        per_split = triton.cdiv(triton.cdiv(c, block_c), splits) * block_c
        splits = triton.cdiv(c, per_split)
        grid = (*blocks, splits)
        # Also for one split: a direct store would be a second compiled kernel, chosen by M.
        partials = x_MC.new_empty(splits, m, r, dtype=torch.float32)
        narrow_kernels.shrink_kernel[grid](
            x_MC, v_CR, partials, m, c, r, per_split, *x_MC.stride(), *v_CR.stride(),
            seed_of(seed), dropout_p, dropout_p > 0, launch.dot_precision(x_MC.dtype),
            BLOCK_R=block_r, **config.options,
        )  # fmt: skip
        return _sum_partials(partials, out_MR, scaling)

    return launch.tuned(_configs("shrink", x_MC), ("shrink", x_MC.dtype, c, r), x_MC, run)


def columns_product(
    x_MC: Tensor,
    p_MR: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    rank_first: bool,
    v_CR: Tensor | None = None,
    rows_out: Tensor | None = None,
    rows_scaling: float = 1.0,
) -> Tensor:
    """scaling · drop(X)ᵀ P as [R, C] or [C, R] in float32, for a sum over many rows may be beyond
    fp16; with V also rows_out = rows_scaling · X V in X's dtype.

    X is read once for both. V [C, R] is contiguous, and so are the rows of P and rows_out [M, R].
    """
    (m, c), r = x_MC.shape, p_MR.shape[1]
    d = x_MC.new_empty((r, c) if rank_first else (c, r), dtype=torch.float32)
    if not m or not c:
        if rows_out is not None:
            rows_out.zero_()
        return d.zero_()
    block_r = min(launch.padded(r), MAX_BLOCK_R)
    stride_dr, stride_dc = (c, 1) if rank_first else (1, r)

    def run(config: Config) -> Tensor:
        block_m, block_c = config.blocks["BLOCK_M"], config.blocks["BLOCK_C"]
        blocks = triton.cdiv(c, block_c), triton.cdiv(r, block_r)
        splits = _splits(x_MC, blocks[0] * blocks[1], triton.cdiv(m, block_m), least=2)
        per_split = triton.cdiv(triton.cdiv(m, block_m), splits) * block_m
        splits = triton.cdiv(m, per_split)
        grid = (*blocks, splits)
        d_partials = x_MC.new_empty(splits, *d.shape, dtype=torch.float32)
        row_partials = None
        if rows_out is not None:
            row_partials = x_MC.new_empty(blocks[0], m, r, dtype=torch.float32)
        narrow_kernels.columns_kernel[grid](
            x_MC, p_MR, v_CR, d_partials, row_partials, m, c, r, per_split, *x_MC.stride(),
            p_MR.stride(0), stride_dc, stride_dr, seed_of(seed), dropout_p, dropout_p > 0,
            rows_out is not None, launch.dot_precision(x_MC.dtype),
            BLOCK_R=block_r, **config.options,
        )  # fmt: skip
        if rows_out is not None and row_partials is not None:
            _sum_partials(row_partials, rows_out, rows_scaling)
        return _sum_partials(d_partials, d, scaling)

    configs = _configs("columns", x_MC)
    # A larger accumulator spills, and half of it does where rows of P do not start at 16 elements.
    # Every row of the table has an entry for the largest rank block.
    largest = 4096 if r % 16 and block_r == 16 else 8192
    configs = tuple(c for c in configs if c.blocks["BLOCK_C"] * block_r <= largest)
    key = ("columns", x_MC.dtype, c, r, rows_out is not None)
    return launch.tuned(configs, key, x_MC, run)


def kext_gemm(
    xs_MK: Sequence[Tensor],
    ws_KN: Sequence[Tensor],
    p_MR: Tensor,
    v_RN: Tensor,
    bias_N: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    tma: bool,
) -> Tensor:
    """Σ X_i W_i + s drop(P V) + bias [M, N] in X's dtype, for at most SOURCES sources.

    One launch, nothing of size M is read twice.
    """
    x_MK, count, n, r = xs_MK[0], len(xs_MK), ws_KN[0].shape[1], p_MR.shape[1]
    m = x_MK.shape[0]
    out_MN, bias_N = x_MK.new_empty(m, n), packed(bias_N)
    if not m or not n:
        return out_MN
    xs = [*xs_MK, *[x_MK] * (SOURCES - count)]  # sources beyond the count are never touched
    ws = [*ws_KN, *[ws_KN[0]] * (SOURCES - count)]
    sizes = (m, n, *(x.shape[1] for x in xs), r)
    small = (p_MR.stride(0), *v_RN.stride(), scaling, seed_of(seed), dropout_p)
    # By pointers, P and V held through several loops, or more of them, spill on sm_80.
    most = MAX_BLOCK_R if tma else launch.LEAST_TILE if count == 1 else 0
    held = not dropout_p and r <= most
    block_r = launch.padded(r) if held else _kext_block_r(x_MK, r)
    switches = (count, dropout_p > 0, held, launch.dot_precision(x_MK.dtype))
    w_is_nk = ws[0].stride(0) == 1

    def run(config: Config) -> Tensor:
        if tma:
            operands = [
                descriptor
                for x, w in zip(xs, ws, strict=True)
                for descriptor in (
                    _descriptor(x, config, "MK"),
                    _descriptor(w.T, config, "NK") if w_is_nk else _descriptor(w, config, "KN"),
                )
            ]
            stored = min(config.blocks["BLOCK_N"], MAX_STORED)
            out_desc = TensorDescriptor.from_tensor(out_MN, [config.blocks["BLOCK_M"], stored])
            gemm_kernels.kext_tma_kernel[_persistent(out_MN, config)](
                *operands, out_desc, p_MR, v_RN, bias_N, *sizes, *small,
                *switches, w_is_nk, stored, BLOCK_R=block_r, **config.options,
            )  # fmt: skip
        else:
            operands = [t for pair in zip(xs, ws, strict=True) for t in pair]
            strides = [stride for t in (*xs, *ws) for stride in t.stride()]
            gemm_kernels.kext_kernel[(_tile_count(out_MN, config),)](
                *operands, out_MN, p_MR, v_RN, bias_N, *sizes, *strides, *small, *switches,
                BLOCK_R=block_r, **config.options,
            )  # fmt: skip
        return out_MN

    configs = _configs("kext", *xs_MK, *ws_KN, tma=tma)
    if dropout_p:  # the mask of a larger tile spills
        configs = tuple(c for c in configs if c.blocks["BLOCK_N"] <= 128)
    key = ("kext", x_MK.dtype, *sizes[1:], count, tma, dropout_p > 0, w_is_nk)
    return launch.tuned(configs, key, x_MK, run)


def fits_tma(x_MK: Tensor, w: Tensor) -> bool:
    """True where X, W and their product can be described to the copy engine of this GPU."""
    if x_MK.dtype == torch.float32 or launch.architecture(x_MK.device) < 90:
        return False
    strides = [size for t in (x_MK, w) for size in (t.stride(0), *w.shape)]
    # A dY that autograd expanded has rows that overlap, which a descriptor cannot say.
    return not any(size * w.element_size() % 16 for size in strides) and all(
        t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.data_ptr() % 16 == 0 for t in (x_MK, w)
    )


def aligned(operand: Tensor) -> bool:
    """True where pointer kernels load wide words: Triton looks for multiples of 16 elements."""
    inner, outer = sorted(operand.stride())
    multiples = not outer % 16 and not operand.shape[1] % 16
    return inner == 1 and multiples and operand.data_ptr() % 16 == 0


def packed(bias_N: Tensor | None) -> Tensor | None:
    """The bias as kernels read it: contiguous."""
    return None if bias_N is None else bias_N.contiguous()


def seed_of(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed)


def _configs(kernel: str, *operands: Tensor, tma: bool = False) -> tuple[Config, ...]:
    arch = launch.architecture(operands[0].device)
    if operands[0].dtype == torch.float32 or not (tma or all(map(aligned, operands))):
        return ((SMALL_86 if arch == 86 else SMALL)[kernel],)
    return CONFIGS[kernel][arch]


def _kext_block_r(x_MK: Tensor, r: int) -> int:
    """Beside a GEMM's accumulator registers are dear, in float32 above all."""
    return min(launch.padded(r), 16 if x_MK.dtype == torch.float32 else 32)


def _descriptor(tensor: Tensor, config: Config, axes: str) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, [config.blocks[f"BLOCK_{axis}"] for axis in axes])


def _tile_count(out_MN: Tensor, config: Config) -> int:
    m, n = out_MN.shape
    return triton.cdiv(m, config.blocks["BLOCK_M"]) * triton.cdiv(n, config.blocks["BLOCK_N"])


def _persistent(out_MN: Tensor, config: Config) -> tuple[int]:
    return (min(_tile_count(out_MN, config), launch.multiprocessors(out_MN.device)),)


def _splits(tensor: Tensor, blocks: int, steps: int, least: int) -> int:
    """Number of parts of a sum with which two programs per multiprocessor run, of at least
    ``least`` steps each."""
    wanted = triton.cdiv(2 * launch.multiprocessors(tensor.device), blocks)
    return max(1, min(wanted, steps // least))


def _sum_partials(partials: Tensor, out: Tensor, scaling: float) -> Tensor:
    """out [rows, columns] = scaling · partials.sum(0), in order, rounded once."""
    size = out.numel()
    if size:
        narrow_kernels.sum_partials_kernel[(triton.cdiv(size, 1024),)](
            partials, out, size, partials.shape[0], out.shape[1], out.stride(0), scaling,
            BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return out
