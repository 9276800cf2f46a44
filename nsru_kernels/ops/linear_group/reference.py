"""y_i = x W_iᵀ + b_i + s_i S_i B_iᵀ, S = x Āᵀ, in eager PyTorch: the definition, up to float64.

Library GEMMs only. The small product goes first and the large GEMMs are accumulated onto it (beta
1), so that reading y, or dX, hides in them. Nothing of size M is cast or copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsru_kernels.ops.products import rank_columns, scaled_product


def forward(
    x_MK: Tensor,
    ws_NK: list[Tensor],
    a_RK: Tensor,
    bs_NR: list[Tensor],
    biases_N: list[Tensor | None],
    scalings: list[float],
) -> tuple[list[Tensor], Tensor]:
    """([y_i [M, N_i]], S [M, ΣR]). ``a`` is the folded adapters on top of each other."""
    s_MR = F.linear(x_MK, a_RK)
    ys = []
    for w_NK, b_NR, bias_N, scaling, s in zip(
        ws_NK, bs_NR, biases_N, scalings, rank_columns(s_MR, bs_NR), strict=True
    ):
        if bias_N is None:
            y_MN = scaled_product(s, b_NR.T, scaling)
        else:
            y_MN = torch.addmm(bias_N, s, b_NR.T, alpha=scaling)
        ys.append(y_MN.addmm_(x_MK, w_NK.T))
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
    """[dX, dĀ, *dW, *dbias, *dB] in x's dtype; an empty tensor where ``needs`` is False.

    Other backends may hand dĀ and dB out in float32. A ``dy`` of None is an output that nobody
    used: what belongs to it alone stays empty, and its rows of dĀ are zero.
    """
    grads = [x_MK.new_empty(0) for _ in needs]  # no two outputs of an op may alias
    count = len(ws_NK)
    need_x, need_a = needs[:2]
    if need_x or need_a:
        ds_MR = torch.empty_like(s_MR)
        for dy_MN, b_NR, scaling, ds in zip(
            dys_MN, bs_NR, scalings, rank_columns(ds_MR, bs_NR), strict=True
        ):
            if dy_MN is None:
                ds.zero_()
            else:
                torch.addmm(ds, dy_MN, b_NR, beta=0, alpha=scaling, out=ds)
    if need_x:
        grads[0] = ds_MR @ a_RK
    if need_a:
        grads[1] = ds_MR.T @ x_MK
    for i, (dy_MN, s, scaling) in enumerate(
        zip(dys_MN, rank_columns(s_MR, bs_NR), scalings, strict=True)
    ):
        if dy_MN is None:
            continue
        if need_x:
            grads[0].addmm_(dy_MN, ws_NK[i])
        if needs[2 + i]:
            grads[2 + i] = dy_MN.T @ x_MK
        if needs[2 + count + i]:
            grads[2 + count + i] = dy_MN.sum(0)
        if needs[2 + 2 * count + i]:
            # With dY on the right: a tenth faster on a CPU, and only [R, N] to turn round.
            grads[2 + 2 * count + i] = scaled_product(s.T, dy_MN, scaling).T.contiguous()
    return grads
