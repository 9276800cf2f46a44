"""Siblings on a CPU with AMX: the same functions as reference.py, bf16 only.

Forward is one product with K extended, [x ∣ s_i S_i]·[W_i ∣ B_i]ᵀ + b_i for every sibling: x is
packed once for S and for all y. Backward computes dS_i = s_i dY_i B_i and dB_i = s_i dY_iᵀ S_i side
by side, then dX and dĀ = dSᵀ x. dX, [dY_1 ∣ dY_2 ∣ … ∣ dS]·[W_1 ; W_2 ; … ; Ā], is one sum, rounded
once, and is asked for as its transpose: a left operand is packed once, a right one for every 256
rows, and W, which has to be interleaved, costs more than dY, which lies in tiles.
"""

from __future__ import annotations

from torch import Tensor

from nsru_kernels.ops.cpu_extension import Narrow, Output, Product, check_operands, multiply
from nsru_kernels.ops.products import rank_columns


def forward(
    x_MK: Tensor,
    ws_NK: list[Tensor],
    a_RK: Tensor,
    bs_NR: list[Tensor],
    biases_N: list[Tensor | None],
    scalings: list[float],
) -> tuple[list[Tensor], Tensor]:
    """([y_i [M, N_i]], S [M, ΣR]); see reference.py."""
    check_operands("nsru_linear_group", x_MK)
    m = x_MK.shape[0]
    s_MR = x_MK.new_empty(m, a_RK.shape[0])
    ys = [x_MK.new_empty(m, w_NK.shape[0]) for w_NK in ws_NK]
    as_RK = a_RK.split_with_sizes([b_NR.shape[1] for b_NR in bs_NR])
    narrows = [
        Narrow(Output(s, [(0, a.T)]), scaling)
        for a, s, scaling in zip(as_RK, rank_columns(s_MR, bs_NR), scalings, strict=True)
    ]
    outputs = [
        Output(y_MN, [(0, w_NK.T), (1 + i, b_NR.T)], bias=bias_N)
        for i, (y_MN, w_NK, b_NR, bias_N) in enumerate(zip(ys, ws_NK, bs_NR, biases_N, strict=True))
    ]
    multiply(Product([x_MK], outputs, narrows))
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
    check_operands("nsru_linear_group", x_MK)
    count = len(ws_NK)
    grads = [x_MK.new_empty(0) for _ in needs]
    need_x, need_a = needs[:2]
    used = [(i, dy_MN) for i, dy_MN in enumerate(dys_MN) if dy_MN is not None]
    ds_MR = s_MR.new_zeros(s_MR.shape) if len(used) < count else s_MR.new_empty(s_MR.shape)
    if need_x:
        grads[0] = x_MK.new_empty(x_MK.shape) if used else x_MK.new_zeros(x_MK.shape)
    first, then = [], []
    ds, ss = rank_columns(ds_MR, bs_NR), rank_columns(s_MR, bs_NR)
    for i, dy_MN in used:
        if need_x or need_a:
            first.append(Product([bs_NR[i].T], [Output(ds[i].T, [(0, dy_MN.T)], scalings[i])]))
        if needs[2 + i]:
            grads[2 + i] = dy_MN.T @ x_MK
        if needs[2 + count + i]:
            grads[2 + count + i] = dy_MN.sum(0)
        if needs[2 + 2 * count + i]:
            grads[2 + 2 * count + i] = db_NR = x_MK.new_empty(bs_NR[i].shape)
            first.append(Product([dy_MN.T], [Output(db_NR, [(0, ss[i])], scalings[i])]))
    if need_x and used:
        as_RK = a_RK.split_with_sizes([b_NR.shape[1] for b_NR in bs_NR])
        lefts = [w.T for w in (*(ws_NK[i] for i, _ in used), *(as_RK[i] for i, _ in used))]
        rights = [dy.T for dy in (*(dy_MN for _, dy_MN in used), *(ds[i] for i, _ in used))]
        then.append(Product(lefts, [Output(grads[0].T, list(enumerate(rights)))]))
    if need_a:
        grads[1] = a_RK.new_empty(a_RK.shape)
        then.append(Product([x_MK.T], [Output(grads[1].T, [(0, ds_MR)])]))
    multiply(*first)
    multiply(*then)
    return grads
