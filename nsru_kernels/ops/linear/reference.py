"""y_i = x W_iᵀ + b_i + s_i S_i B_iᵀ, S = dropout(x) Āᵀ, in eager PyTorch: the definition, up to
float64.

Library GEMMs only, and few calls. In backward the small product goes first and the large GEMMs are
accumulated onto it (beta 1), so that reading dX hides in them; in forward by plan: ``addmm`` adds
the small product last, ``expand_first`` first. Nothing of size M is cast or copied;
the dropout mask is drawn again instead of being stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nsru_kernels.ops.products import frozen_gradients, rank_columns

PLANS = ("addmm", "expand_first")


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
    """([y_i [M, N_i]], S [M, ΣR]). ``a`` is the projected adapters on top of each other."""
    s_MR = F.linear(drop(x_MK, dropout_p, seed) if dropout_p else x_MK, a_RK)
    ss_MR = (s_MR,) if len(bs_NR) == 1 else rank_columns(s_MR, bs_NR)
    ys = []
    for w_NK, b_NR, bias_N, scaling, s in zip(ws_NK, bs_NR, biases_N, scalings, ss_MR, strict=True):
        if plan == "expand_first":
            ys.append(F.linear(s, scaling * b_NR, bias_N).addmm_(x_MK, w_NK.T))
        else:
            ys.append(F.linear(x_MK, w_NK, bias_N).addmm_(s, b_NR.T, alpha=scaling))
    return ys, s_MR


def backward(
    dys_MN: list[Tensor | None],
    x_MK: Tensor,
    ws_NK: Sequence[Tensor | None],
    a_RK: Tensor,
    bs_NR: list[Tensor],
    s_MR: Tensor,
    scalings: list[float],
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
    plan: str | None = None,
) -> list[Tensor | None]:
    """[dX, dĀ, *dW, *dbias, *dB] in x's dtype; None where ``needs`` is False.

    All plans are one here.
    Other backends may hand dĀ and dB out in float32. A ``dy`` of None is an output that nobody
    used: what belongs to it alone is None, and its rows of dĀ are zero. A W of None adds nothing to
    dX.
    """
    count = len(ws_NK)
    need_x, need_a = needs[:2]
    need_b = needs[2 + 2 * count :]
    ss_MR = (s_MR,) if count == 1 else rank_columns(s_MR, bs_NR)
    dx = da = None
    if need_x or need_a:
        parts = []
        for dy_MN, b_NR, s, scaling in zip(dys_MN, bs_NR, ss_MR, scalings, strict=True):
            if dy_MN is None:
                parts.append(s.new_zeros(s.shape))
            else:  # with beta 0 addmm reads nothing of its first argument but the shape
                parts.append(torch.addmm(s, dy_MN, b_NR, beta=0, alpha=scaling))
        ds_MR = parts[0] if count == 1 else torch.cat(parts, 1)
    if need_x:
        dx = ds_MR @ a_RK
        if dropout_p:
            dx = drop(dx, dropout_p, seed)
        for dy_MN, w_NK in zip(dys_MN, ws_NK, strict=True):
            if dy_MN is not None and w_NK is not None:
                dx.addmm_(dy_MN, w_NK)
    if need_a:
        da = ds_MR.T @ (drop(x_MK, dropout_p, seed) if dropout_p else x_MK)
    dbs: list[Tensor | None] = [None] * count
    for i, (dy_MN, b_NR, s) in enumerate(zip(dys_MN, bs_NR, ss_MR, strict=True)):
        if need_b[i] and dy_MN is not None:
            dbs[i] = b_gradient(dy_MN, b_NR, s, scalings[i])
    return [dx, da, *frozen_gradients(dys_MN, x_MK, needs), *dbs]


def b_gradient(dy_MN: Tensor, b_NR: Tensor, s_MR: Tensor, scaling: float) -> Tensor:
    """dB = s dYᵀ S [N, R]."""
    # With dY on the right: a tenth faster on a CPU, and only [R, N] to turn round.
    db_RN = torch.addmm(b_NR.T, s_MR.T, dy_MN, beta=0, alpha=scaling)
    return db_RN.T.contiguous()


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
