"""The functions of reference.py with the CUDA extension, where it beats the library.

Forward: S of all linears by the library, then for each one GEMM [x ∣ S]·[W ∣ sB]ᵀ + b, sm_90a.
Backward: dS_i and dB_i from one read of dY_i, up to R = 32; dX starts as the GEMM
[dY_1 ∣ dS]·[W_1 ; Ā] and library GEMMs accumulate the other dY_i W_i onto it (beta 1); dĀ by the
library. By plan expand_first the large GEMMs are the library's too: y = s S Bᵀ + b, y += x Wᵀ;
dX = dS Ā, dX += dY_i W_i. Sums are in a fixed order. Nothing of size M is copied, unless x or dY is
not row-major; R-sized operands whose rows would not start at 16 bytes are copied into padded rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsru_kernels.dispatch.extension import row_major
from nsru_kernels.ops.linear import reference
from nsru_kernels.ops.linear.cuda_products import (
    check_operands,
    columns_product,
    gemm_choice,
    kext_gemm,
    padded,
)
from nsru_kernels.ops.products import (
    frozen_gradients,
    input_gradient,
    one_read_pays,
    public_name,
    rank_columns,
)

PLANS = ("kext", "expand_first")


def forward(
    x_MK: Tensor,
    ws_NK: list[Tensor],
    a_RK: Tensor,
    bs_NR: list[Tensor],
    biases_N: list[Tensor | None],
    scalings: list[float],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    plan: str | None = None,
) -> tuple[list[Tensor], Tensor]:
    """([y_i [M, N_i]], S [M, ΣR]); see reference.py.

    ``plan`` is one of PLANS, kext with the GEMM's configuration where it was measured, at sizes
    near these; see ``cuda_products.gemm_choice``.
    """
    _check(x_MK, ws_NK, dropout_p)
    plan, _, tiles = (plan or "").partition(" ")
    x_MK = row_major(x_MK)
    if plan == "expand_first":
        return reference.forward(x_MK, ws_NK, a_RK, bs_NR, biases_N, scalings, plan=plan)
    vs_RN = [padded(b_NR, scaling).T for b_NR, scaling in zip(bs_NR, scalings, strict=True)]
    s_MR = F.linear(x_MK, a_RK)
    ss_MR, choice = rank_columns(s_MR, bs_NR), gemm_choice(tiles)
    ys = [
        kext_gemm(x_MK, w_NK.T, padded(s), v_RN, bias_N, after_narrow=False, **choice)
        for w_NK, s, v_RN, bias_N in zip(ws_NK, ss_MR, vs_RN, biases_N, strict=True)
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
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
    plan: str | None = None,
) -> list[Tensor | None]:
    """[dX, dĀ, *dW, *dbias, *dB] in x's dtype; None where not needed or not used."""
    plan, _, tiles = (plan or "").partition(" ")
    _check(x_MK, ws_NK, dropout_p)
    need_x, need_a = needs[:2]
    need_ds, need_b = need_x or need_a, needs[2 + 2 * len(ws_NK) :]
    dx: Tensor | None = None
    da: Tensor | None = None
    dbs: list[Tensor | None] = [None] * len(bs_NR)
    dys_MN = [None if dy_MN is None else row_major(dy_MN) for dy_MN in dys_MN]
    a_RK = padded(row_major(a_RK))
    ds_MR = s_MR.new_empty(s_MR.shape)
    columns = zip(rank_columns(s_MR, bs_NR), rank_columns(ds_MR, bs_NR), strict=True)
    for i, (s, ds) in enumerate(columns):
        dy_MN, b_NR, scaling = dys_MN[i], bs_NR[i].contiguous(), scalings[i]
        if dy_MN is None:
            ds.zero_()
            continue
        if need_b[i] and need_ds and one_read_pays(b_NR.shape[1]):
            dbs[i] = columns_product(
                dy_MN, padded(s), scaling, v_CR=b_NR, rows_out=ds, rows_scaling=scaling
            )
            continue
        if need_ds:
            torch.addmm(ds, dy_MN, b_NR, beta=0, alpha=scaling, out=ds)
        if need_b[i]:
            dbs[i] = reference.b_gradient(dy_MN, b_NR, s, scaling)
    if need_ds:
        p_MR = padded(ds_MR)
    if need_x and plan == "expand_first":
        dx = input_gradient(dys_MN, ws_NK, ds_MR, a_RK)
    elif need_x:
        # With one linear the product that makes dS was enqueued last.
        alone = p_MR is ds_MR and len(ws_NK) == 1
        choice = gemm_choice(tiles)
        dx = _input_gradient(dys_MN, ws_NK, p_MR, a_RK, after_narrow=alone, **choice)
    if need_a:
        da = ds_MR.T @ x_MK
    return [dx, da, *frozen_gradients(dys_MN, x_MK, needs), *dbs]


def _input_gradient(
    dys_MN: list[Tensor | None],
    ws_NK: list[Tensor],
    ds_MR: Tensor,
    a_RK: Tensor,
    *,
    after_narrow: bool,
    **choice: int,
) -> Tensor:
    """Σ dY_i W_i + dS Ā."""
    used = [(dy, w) for dy, w in zip(dys_MN, ws_NK, strict=True) if dy is not None]
    if not used:
        return ds_MR.new_zeros(ds_MR.shape[0], a_RK.shape[1])
    dy_MN, w_NK = used[0]
    dx_MK = kext_gemm(dy_MN, w_NK, ds_MR, a_RK, None, after_narrow=after_narrow, **choice)
    for dy_MN, w_NK in used[1:]:
        dx_MK.addmm_(dy_MN, w_NK)
    return dx_MK


def _check(x_MK: Tensor, ws_NK: list[Tensor], dropout_p: float) -> None:
    """Raises BackendUnavailable."""
    for w_NK in ws_NK:
        check_operands(public_name(ws_NK), x_MK, w_NK, dropout_p)
