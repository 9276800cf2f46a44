"""The sketch update in Triton, by two routes; see README.md.

wide sketch      two passes over x: S, then [Y ; H] += [x ∣ S]ᵀ S
L ≤ ONE_READ     one launch that reads x from memory once, the second time from L2
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from nsru_kernels.dispatch import launch
from nsru_kernels.dispatch.launch import Config
from nsru_kernels.ops.sketch import triton_kernels as kernels

PLANS = ("one_read", "two_reads")
# Below this width both passes over x cost more than the products (model: 790 TFLOP/s, 4.3 TB/s).
ONE_READ = 184
# Two panels of x are to stay in L2 together (40 MiB on A100, 50 MiB on H100; 6 on a
# GeForce of 8.6, which reads x twice). Not measured.
_PANEL_BYTES = 16 << 20
_MAX_K_CHUNKS, _MAX_M_CHUNKS, _MAX_SPLITS = 8, 4, 8
# Rows of products that a multiprocessor computes while a part of its tile is written and read
# again, for each tile there is (model: 6 TFLOP/s a multiprocessor, 4.3 TB/s).
_PART_COST = 6
_SUM_BLOCK = 1024


def _rows(m: int, n: int, step: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_L": n, "STEP_K": step}, warps, stages)


def _products(k: int, n: int, step: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_K": k, "BLOCK_L": n, "STEP_M": step}, warps, stages)


# Compiled, not measured. By architecture and bytes of x's dtype.
_ROWS = {
    (80, 2): (_rows(128, 128, 32, 8, 4), _rows(128, 64, 64, 4, 3)),
    (86, 2): (_rows(128, 64, 32, 8, 4), _rows(64, 64, 64, 4, 3)),
    (90, 2): (_rows(128, 128, 64, 8, 4), _rows(64, 128, 64, 4, 4)),
    (100, 2): (_rows(128, 128, 64, 8, 4), _rows(128, 64, 64, 4, 4)),
    (86, 4): (_rows(64, 32, 32, 4, 3),),  # of 64 columns it spills on sm_120
} | {(arch, 4): (_rows(64, 64, 32, 4, 3),) for arch in (80, 90, 100)}
_PRODUCTS = {
    (80, 2): _products(128, 128, 32, 8, 4),
    (86, 2): _products(128, 128, 32, 8, 4),
    (90, 2): _products(128, 128, 64, 8, 4),
    (100, 2): _products(128, 128, 64, 8, 4),
} | {(arch, 4): _products(64, 64, 32, 4, 3) for arch in launch.ARCHITECTURES}
_READ_ONCE = {
    (80, 2): ({"BLOCK_M": 64, "STEP_K": 64, "STEP_M": 32}, 8, 3),
    (86, 2): ({"BLOCK_M": 64, "STEP_K": 64, "STEP_M": 32}, 8, 3),
    (90, 2): ({"BLOCK_M": 64, "STEP_K": 64, "STEP_M": 64}, 8, 4),
    (100, 2): ({"BLOCK_M": 64, "STEP_K": 64, "STEP_M": 64}, 8, 4),
} | {
    (arch, 4): ({"BLOCK_M": 32, "STEP_K": 32, "STEP_M": 32}, 8, 2) for arch in launch.ARCHITECTURES
}


def update_sketch(
    x_MK: Tensor,
    omega_KL: Tensor,
    y_KL: Tensor,
    h_LL: Tensor,
    mask_M: Tensor | None,
    split: bool,
    limit: float,
    plan: str | None = None,
) -> Tensor:
    """As reference.py; y and h are left alone by the device, the host waits for nothing.

    ``plan`` is one of PLANS; None takes the one that should move less at this width (model).

    Raises:
        BackendUnavailable: fp64 activations or accumulators.
    """
    launch.check_dtypes("update_sketch", x_MK, y_KL)
    if not x_MK.numel():
        return torch.zeros((), dtype=torch.float64, device=x_MK.device)
    if mask_M is not None:
        mask_M = mask_M.contiguous().view(torch.uint8)
    # Rows of S and Ω start at multiples of 32 bytes, whatever L is.
    padding = -omega_KL.shape[1] % launch.LEAST_TILE
    omega_KW = F.pad(omega_KL.to(x_MK.dtype), (0, padding)).contiguous()
    if plan not in PLANS:
        plan = "one_read" if y_KL.shape[1] <= ONE_READ else "two_reads"
    route = _update_in_one_read if plan == "one_read" else _update_in_two
    return route(x_MK, omega_KW, y_KL, h_LL, mask_M, split, limit)


def _update_in_two(
    x_MK: Tensor,
    omega_KW: Tensor,
    y_KL: Tensor,
    h_LL: Tensor,
    mask_M: Tensor | None,
    split: bool,
    limit: float,
) -> Tensor:
    rows, k = x_MK.shape
    width, out_width = omega_KW.shape[1], y_KL.shape[1]
    row = launch.architecture(x_MK.device), _bytes(x_MK)

    def sketch_rows(config: Config) -> tuple[Tensor, Tensor]:
        s_PMW = x_MK.new_empty(1 + split, rows, width)
        blocks = triton.cdiv(rows, config.blocks["BLOCK_M"])
        energy = torch.empty(blocks, dtype=torch.float64, device=x_MK.device)
        kernels.sketch_rows_kernel[(blocks * triton.cdiv(width, config.blocks["BLOCK_L"]),)](
            x_MK, omega_KW, mask_M, s_PMW, energy, rows, k, width, *x_MK.stride(),
            **_rounding(x_MK.dtype, split), **config.options,
        )  # fmt: skip
        return s_PMW, energy

    def add_products(config: Config) -> Tensor:
        blocks = config.blocks
        tiles = triton.cdiv(k, blocks["BLOCK_K"]) + triton.cdiv(out_width, blocks["BLOCK_K"])
        tiles *= triton.cdiv(out_width, blocks["BLOCK_L"])
        splits = _splits(tiles, rows, launch.multiprocessors(x_MK.device))
        part_rows = _chunk(rows, splits, blocks["STEP_M"])
        splits = triton.cdiv(rows, part_rows)
        partial = splits > 1
        parts = y_KL.new_empty((splits if partial else 0) * (k + out_width) * out_width)
        trace = torch.empty((), dtype=torch.float64, device=x_MK.device)
        kernels.add_products_kernel[(tiles * splits,)](
            x_MK, s_PMW, mask_M, y_KL, h_LL, parts, energy, trace,
            rows, k, width, out_width, *x_MK.stride(), part_rows, splits, energy.numel(), limit,
            PLANES=1 + split, PRECISION=launch.dot_precision(x_MK.dtype),
            **config.options,
        )  # fmt: skip
        if partial:
            grid = (triton.cdiv((k + out_width) * out_width, _SUM_BLOCK),)
            kernels.sum_splits_kernel[grid](
                parts, y_KL, h_LL, trace, k, out_width, splits, limit, BLOCK=_SUM_BLOCK
            )
        return trace

    key = ("sketch_rows", x_MK.dtype, k, width, split)
    s_PMW, energy = launch.tuned(_ROWS[row], key, x_MK, sketch_rows)
    # One config: a launch that adds in place cannot be repeated to time it.
    return launch.tuned((_PRODUCTS[row],), (), x_MK, add_products)


def _update_in_one_read(
    x_MK: Tensor,
    omega_KW: Tensor,
    y_KL: Tensor,
    h_LL: Tensor,
    mask_M: Tensor | None,
    split: bool,
    limit: float,
) -> Tensor:
    rows, k = x_MK.shape
    width, out_width = omega_KW.shape[1], y_KL.shape[1]
    programs = launch.multiprocessors(x_MK.device)

    def read_once(config: Config) -> Tensor:
        blocks = config.blocks
        l_tiles = triton.cdiv(width, blocks["BLOCK_L"])
        tiles = triton.cdiv(k, blocks["BLOCK_K"]) + triton.cdiv(out_width, blocks["BLOCK_K"])
        row_blocks = triton.cdiv(rows, blocks["BLOCK_M"])
        block_bytes = blocks["BLOCK_M"] * k * x_MK.dtype.itemsize
        panel_blocks = min(max(_PANEL_BYTES // block_bytes, 1), row_blocks)
        panels = triton.cdiv(row_blocks, panel_blocks)
        panel_rows = panel_blocks * blocks["BLOCK_M"]
        k_chunks = min(max(programs // (panel_blocks * l_tiles), 1), _MAX_K_CHUNKS)
        k_chunk = _chunk(k, k_chunks, blocks["STEP_K"])
        k_chunks = triton.cdiv(k, k_chunk)
        m_chunks = min(max(programs // (tiles * l_tiles), 1), _MAX_M_CHUNKS)
        m_chunk = _chunk(panel_rows, m_chunks, blocks["STEP_M"])
        m_chunks = triton.cdiv(panel_rows, m_chunk)

        s_PMW = x_MK.new_empty(1 + split, rows, width)
        wide_s = y_KL.new_empty(rows * width if k_chunks > 1 else 0)
        sums = y_KL.new_empty((k + out_width) * out_width if panels * m_chunks > 1 else 0)
        energies = panels * panel_blocks * k_chunks
        energy = torch.empty(energies, dtype=torch.float64, device=x_MK.device)
        trace = torch.empty((), dtype=torch.float64, device=x_MK.device)
        flags = 1 + panels + panels * panel_blocks * l_tiles + tiles * l_tiles
        counters = torch.zeros(flags, dtype=torch.int32, device=x_MK.device)
        items = panels * l_tiles * (k_chunks * panel_blocks + m_chunks * tiles)
        # Two programs share a multiprocessor where they fit; the others find no tickets left.
        kernels.read_once_kernel[(min(items, 2 * programs),)](
            x_MK, omega_KW, mask_M, y_KL, h_LL, s_PMW, wide_s, sums, energy, trace, counters,
            rows, k, width, out_width, *x_MK.stride(),
            panels, panel_blocks, k_chunk // blocks["STEP_K"], k_chunks, m_chunk, m_chunks, limit,
            PLANES=1 + split, **_rounding(x_MK.dtype, split), **config.options,
        )  # fmt: skip
        return trace

    config = _read_once_config(launch.architecture(x_MK.device), _bytes(x_MK), out_width)
    # One config, for the same reason as above.
    return launch.tuned((config,), (), x_MK, read_once)


def _bytes(x_MK: Tensor) -> int:
    """2 for the tiles of 16-bit operands; 4 for the small ones, which fp32 needs for its three
    products and rows that do not start at 16 elements for their many addresses."""
    inner, outer = sorted(x_MK.stride())
    narrow = outer % 16 or x_MK.shape[1] % 16 or inner != 1 or x_MK.data_ptr() % 16
    return 4 if narrow else x_MK.dtype.itemsize


def _read_once_config(arch: int, itemsize: int, out_width: int) -> Config:
    blocks, warps, stages = _READ_ONCE[arch, itemsize]
    # One tile where that wastes no columns to a power of two. Tiles of products have at most 8192
    # entries (4096 in fp32): adding larger ones to their sums spills registers on sm_90.
    block_l = launch.padded(out_width) if out_width <= 128 else 64
    if itemsize == 4:
        block_l = min(block_l, 64)
    block_k = 64 if block_l == 128 or itemsize == 4 else 128
    return Config({**blocks, "BLOCK_K": block_k, "BLOCK_L": block_l}, warps, stages)


def _rounding(dtype: torch.dtype, split: bool) -> dict[str, object]:
    return {
        "SPLIT": split,
        "LARGEST": torch.finfo(dtype).max,
        "PRECISION": launch.dot_precision(dtype),
    }


def _chunk(size: int, chunks: int, step: int) -> int:
    """Length of `chunks` about equal chunks of `size`, in whole steps."""
    return triton.cdiv(triton.cdiv(size, chunks), step) * step


def _splits(tiles: int, rows: int, programs: int) -> int:
    """Into how many parts of M the products are cut: full waves against parts to be added."""

    def cost(splits: int) -> float:
        parts = splits if splits > 1 else 0
        return triton.cdiv(tiles * splits, programs) / splits + _PART_COST * tiles * parts / rows

    return min(range(1, _MAX_SPLITS + 1), key=cost)
