"""y = x Wᵀ + b + s S Bᵀ with S = dropout(x) Āᵀ in eager PyTorch: the definition, up to float64.

Library GEMMs in the plan that measured fastest on CPUs and that ``auto`` falls back to elsewhere:
the update is accumulated into y (and into dX) by ``addmm_``, and the scaling rides on its alpha.
Nothing of size M is cast or copied; the dropout mask is drawn again in backward instead of being
stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsru_kernels.ops.products import scaled_product


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
    """(y [M, N], S [M, R]). ``a`` is the folded adapter, like ``b`` in x's dtype."""
    s_MR = F.linear(drop(x_MK, dropout_p, seed), a_RK)
    y_MN = F.linear(x_MK, w_NK, bias_N)
    y_MN.addmm_(s_MR, b_NR.T, alpha=scaling)
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
    """[dX, dW, dbias, dĀ, dB] in x's dtype; an empty tensor where ``needs`` is False.

    Other backends may hand dĀ and dB out in float32.
    """
    need_x, need_w, need_bias, need_a, need_b = needs
    dx, dw, dbias, da, db = (dy_MN.new_empty(0) for _ in needs)  # no two outputs of an op may alias
    if need_x or need_a:
        ds_MR = dy_MN @ b_NR
    if need_x:
        dx = dy_MN @ w_NK
        if dropout_p:
            dx.add_(drop(ds_MR @ a_RK, dropout_p, seed), alpha=scaling)
        else:
            dx.addmm_(ds_MR, a_RK, alpha=scaling)
    if need_w:
        dw = dy_MN.T @ x_MK
    if need_bias:
        dbias = dy_MN.sum(0)
    if need_a:
        da = scaled_product(ds_MR.T, drop(x_MK, dropout_p, seed), scaling)
    if need_b:
        db = scaled_product(dy_MN.T, s_MR, scaling)
    return [dx, dw, dbias, da, db]


def drop(x_MK: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """x with each element zeroed with probability p, the rest times 1/(1-p); fixed by the seed."""
    if not dropout_p:
        return x_MK
    assert seed is not None
    generator = torch.Generator(device=x_MK.device).manual_seed(int(seed))
    keep = torch.empty(x_MK.shape, dtype=torch.bool, device=x_MK.device)
    keep.bernoulli_(1 - dropout_p, generator=generator)
    scale = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    return (x_MK * scale).mul_(keep)
