"""Siblings with the CUDA extension: the same functions as reference.py.

One read of x for the stacked S and one for the stacked dĀ; per sibling one K-extended GEMM forward
and one read of dY_i for dS_i and dB_i. dX = dY_1 W_1 + dS Ā is a K-extended GEMM; library GEMMs
accumulate the other siblings' dY_i W_i onto it (beta 1).
"""

from __future__ import annotations

from torch import Tensor

from nsru_kernels.ops.extension import row_major
from nsru_kernels.ops.linear.cuda_products import (
    check_operands,
    columns_product,
    kext_gemm,
    padded,
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
    _check(x_MK, ws_NK)
    x_MK, a_RK = row_major(x_MK), row_major(a_RK)
    vs_RN = [padded(b_NR, scaling).T for b_NR, scaling in zip(bs_NR, scalings, strict=True)]
    s_MR = rows_product(x_MK, a_RK)
    ss_MR = rank_columns(s_MR, bs_NR)
    ps_MR = [padded(s) for s in ss_MR]
    as_they_lie = all(p is s for p, s in zip(ps_MR, ss_MR, strict=True))
    ys: list[Tensor] = []
    for w_NK, p_MR, v_RN, bias_N in zip(ws_NK, ps_MR, vs_RN, biases_N, strict=True):
        after_narrow = as_they_lie and not ys
        ys.append(kext_gemm(x_MK, w_NK.T, p_MR, v_RN, bias_N, after_narrow=after_narrow))
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
    _check(x_MK, ws_NK)
    count = len(ws_NK)
    grads = [x_MK.new_empty(0) for _ in needs]
    need_x, need_a = needs[:2]
    need_ds = need_x or need_a
    dys_MN = [None if dy_MN is None else row_major(dy_MN) for dy_MN in dys_MN]
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
        need_b = needs[2 + 2 * count + i]
        together = need_b and need_ds and one_read_pays(b_NR.shape[1])
        if need_ds and not together:
            rows_product(dy_MN, row_major(b_NR.T), scaling=scaling, out=ds)
        if need_b:
            grads[2 + 2 * count + i] = columns_product(
                dy_MN, padded(s), scaling, rank_first=False,
                v_CR=b_NR.contiguous() if together else None,
                rows_out=ds if together else None, rows_scaling=scaling,
            )  # fmt: skip
        if needs[2 + i]:
            grads[2 + i] = dy_MN.T @ x_MK
        if needs[2 + count + i]:
            grads[2 + count + i] = dy_MN.sum(0)
    if need_ds:
        ds_MR = padded(ds_MR)
    if need_x:
        grads[0] = _input_gradient(dys_MN, ws_NK, ds_MR, a_RK)
    if need_a:
        grads[1] = columns_product(row_major(x_MK), ds_MR, 1.0, rank_first=True)
    return grads


def _input_gradient(
    dys_MN: list[Tensor | None], ws_NK: list[Tensor], ds_MR: Tensor, a_RK: Tensor
) -> Tensor:
    """Σ dY_i W_i + dS Ā."""
    used = [(dy, w) for dy, w in zip(dys_MN, ws_NK, strict=True) if dy is not None]
    if not used:
        return ds_MR.new_zeros(ds_MR.shape[0], a_RK.shape[1])
    dy_MN, w_NK = used[0]
    dx_MK = kext_gemm(dy_MN, w_NK, ds_MR, row_major(a_RK), None)
    for dy_MN, w_NK in used[1:]:
        dx_MK.addmm_(dy_MN, w_NK)
    return dx_MK


def _check(x_MK: Tensor, ws_NK: list[Tensor]) -> None:
    """Raises BackendUnavailable."""
    for w_NK in ws_NK:
        check_operands("nsru_linear_group", x_MK, w_NK)
