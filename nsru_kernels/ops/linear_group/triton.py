"""Siblings by Triton kernels: the same functions as reference.py.

One read of x for the stacked S and one for the stacked dĀ; per sibling one K-extended GEMM forward
and one read of dY_i for dS_i and dB_i; dX = Σ dY_i W_i + dS Ā is one GEMM with up to three sources,
so no sum of gradients is ever written and read again.
"""

from __future__ import annotations

from torch import Tensor

from nsru_kernels.ops import launch
from nsru_kernels.ops.linear.triton_products import (
    GROUP,
    columns_product,
    fits_tma,
    kext_gemm,
    kext_group_gemm,
    rows_product,
)
from nsru_kernels.ops.products import one_read_pays, rank_columns


def forward(
    x_MK: Tensor,
    ws_NK: list[Tensor],
    a_RK: Tensor,
    bs_NR: list[Tensor],
    biases_N: list[Tensor | None],
    scalings: list[float],
) -> tuple[list[Tensor], Tensor]:
    """([y_i [M, N_i]], S [M, ΣR]); see reference.py."""
    launch.check_dtypes("nsru_linear_group", x_MK)
    s_MR = rows_product(x_MK, a_RK.T)
    ys = [
        kext_gemm(x_MK, w_NK.T, s, b_NR.T, bias_N, scaling, tma=fits_tma(x_MK, w_NK))
        for w_NK, s, b_NR, bias_N, scaling in zip(
            ws_NK, rank_columns(s_MR, bs_NR), bs_NR, biases_N, scalings, strict=True
        )
    ]
    return ys, s_MR


def backward(
    dys_MN: list[Tensor | None],
    x_MK: Tensor,
    ws_NK: list[Tensor],
    a_RK: Tensor,
    bs_NR: list[Tensor],
    s_MR: Tensor,
    scalings: list[float],
    needs: list[bool],
) -> list[Tensor]:
    """[dX, dĀ, *dW, *dbias, *dB] in x's dtype; empty where not needed or not used."""
    launch.check_dtypes("nsru_linear_group", x_MK)
    count = len(ws_NK)
    grads = [x_MK.new_empty(0) for _ in needs]
    need_x, need_a = needs[:2]
    ds_MR = s_MR.new_empty(s_MR.shape)
    for i, (dy_MN, b_NR, s, ds, scaling) in enumerate(
        zip(
            dys_MN,
            bs_NR,
            rank_columns(s_MR, bs_NR),
            rank_columns(ds_MR, bs_NR),
            scalings,
            strict=True,
        )
    ):
        if dy_MN is None:
            ds.zero_()
            continue
        need_ds = need_x or need_a
        together = needs[2 + 2 * count + i] and need_ds and one_read_pays(b_NR.shape[1])
        if need_ds and not together:
            rows_product(dy_MN, b_NR, scaling=scaling, out=ds)
        if needs[2 + 2 * count + i]:
            grads[2 + 2 * count + i] = columns_product(
                dy_MN, s, scaling, rank_first=False,
                v_CR=b_NR.contiguous(),
                rows_out=ds if together else None, rows_scaling=scaling,
            )  # fmt: skip
        if needs[2 + i]:
            grads[2 + i] = dy_MN.T @ x_MK
        if needs[2 + count + i]:
            grads[2 + count + i] = dy_MN.sum(0)
    if need_x:
        grads[0] = _input_gradient(dys_MN, ws_NK, ds_MR, a_RK)
    if need_a:
        grads[1] = columns_product(x_MK, ds_MR, 1.0, rank_first=True)
    return grads


def _input_gradient(
    dys_MN: list[Tensor | None], ws_NK: list[Tensor], ds_MR: Tensor, a_RK: Tensor
) -> Tensor:
    """Σ dY_i W_i + dS Ā; siblings beyond the third are added by library GEMMs."""
    used = [(dy, w) for dy, w in zip(dys_MN, ws_NK, strict=True) if dy is not None]
    if not used:
        return ds_MR.new_zeros(ds_MR.shape[0], a_RK.shape[1])
    dys, ws = zip(*used[:GROUP], strict=True)
    tma = all(map(fits_tma, dys, ws))
    dx_MK = kext_group_gemm(dys, ws, ds_MR, a_RK, tma=tma)
    for dy_MN, w_NK in used[GROUP:]:
        dx_MK.addmm_(dy_MN, w_NK)
    return dx_MK
