"""y = x Wᵀ + b + s S Bᵀ and its gradients with the CUDA extension: the functions of reference.py.

Forward: S from one read of x, then one GEMM [x ∣ S]·[W ∣ sB]ᵀ + b for sm_90a.
Backward: dS and dB from one read of dY; dX by the same GEMM, [dY ∣ dS]·[W ; sĀ]; dĀ from one read
of x. Sums are in a fixed order. Nothing of size M is copied, unless x or dY is not row-major;
R-sized operands whose rows would not start at 16 bytes are copied into padded rows.
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
from nsru_kernels.ops.products import one_read_pays


def forward(
    x_MK: Tensor,
    w_NK: Tensor,
    a_RK: Tensor,
    b_NR: Tensor,
    bias_N: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y [M, N], S [M, R]); see reference.py."""
    check_operands("nsru_linear", x_MK, w_NK, dropout_p)
    x_MK, v_RN = row_major(x_MK), padded(b_NR, scaling).T
    s_MR = rows_product(x_MK, row_major(a_RK))
    p_MR = padded(s_MR)
    y_MN = kext_gemm(x_MK, w_NK.T, p_MR, v_RN, bias_N, after_narrow=p_MR is s_MR)
    return y_MN, s_MR


def backward(
    dy_MN: Tensor,
    x_MK: Tensor,
    w_NK: Tensor,
    a_RK: Tensor,
    b_NR: Tensor,
    s_MR: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """[dX, dW, dbias, dĀ, dB] in x's dtype; an empty tensor where ``needs`` is False."""
    check_operands("nsru_linear", dy_MN, w_NK, dropout_p)
    need_x, need_w, need_bias, need_a, need_b = needs
    dx, dw, dbias, da, db = (dy_MN.new_empty(0) for _ in needs)
    dy_MN, b_NR = row_major(dy_MN), b_NR.contiguous()
    v_RK, s_MR = padded(a_RK, scaling), padded(s_MR)
    need_ds = need_x or need_a
    together = need_b and need_ds and one_read_pays(b_NR.shape[1])
    if need_b and not together:
        db = columns_product(dy_MN, s_MR, scaling, rank_first=False)
    if together:
        ds_MR = s_MR.new_empty(s_MR.shape)
        db = columns_product(dy_MN, s_MR, scaling, rank_first=False, v_CR=b_NR, rows_out=ds_MR)
    elif need_ds:
        ds_MR = rows_product(dy_MN, row_major(b_NR.T))
    if need_ds:
        p_MR = padded(ds_MR)
    if need_x:
        dx = kext_gemm(dy_MN, w_NK, p_MR, v_RK, None, after_narrow=p_MR is ds_MR)
    if need_a:
        da = columns_product(row_major(x_MK), p_MR, scaling, rank_first=True)
    if need_w:
        dw = dy_MN.T @ x_MK
    if need_bias:
        dbias = dy_MN.sum(0)
    return [dx, dw, dbias, da, db]
