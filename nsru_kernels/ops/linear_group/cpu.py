"""Siblings on a CPU with AMX: the same functions as reference.py, bf16 only. The products are in
csrc/cpu/linear.h."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nsru_kernels.ops import cpu_extension
from nsru_kernels.ops.cpu_extension import Arguments, check_operands


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
    take = Arguments()
    siblings = [
        (take.matrix(w_NK), take.matrix(b_NR), scaling, take.vector(bias_N), take.matrix(y_MN))
        for w_NK, b_NR, scaling, bias_N, y_MN in zip(
            ws_NK, bs_NR, scalings, biases_N, ys, strict=True
        )
    ]
    x, a, s = map(take.matrix, (x_MK, a_RK, s_MR))
    cpu_extension.load().forward(x, a, s, siblings, torch.get_num_threads())
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
    """[dX, dĀ, *dW, *dbias, *dB], dĀ and dB in float32; empty where not needed or not used."""
    check_operands("nsru_linear_group", x_MK)
    count = len(ws_NK)
    need_x, need_a = needs[:2]
    need_w, need_bias, need_b = (needs[2 + i * count : 2 + (i + 1) * count] for i in range(3))
    # Columns that belong to an output nobody used stay zero.
    unused = any(dy_MN is None for dy_MN in dys_MN)
    ds_MR = s_MR.new_zeros(s_MR.shape) if unused else s_MR.new_empty(s_MR.shape)
    dx_MK = x_MK.new_empty(x_MK.shape) if need_x else None
    da_RK = a_RK.new_empty(a_RK.shape, dtype=torch.float32) if need_a else None

    def each(
        needs: list[bool], gradient: Callable[[Tensor, Tensor], Tensor]
    ) -> list[Tensor | None]:
        """``gradient(dy, b)`` of every sibling whose output was used, where it is needed."""
        siblings = zip(needs, dys_MN, bs_NR, strict=True)
        return [gradient(dy, b) if need and dy is not None else None for need, dy, b in siblings]

    dbs_NR = each(need_b, lambda dy, b: b.new_empty(b.shape, dtype=torch.float32))
    take = Arguments()
    siblings = [
        (take.matrix(w_NK), take.matrix(b_NR), scaling, take.maybe(dy_MN), take.maybe(db_NR))
        for w_NK, b_NR, scaling, dy_MN, db_NR in zip(
            ws_NK, bs_NR, scalings, dys_MN, dbs_NR, strict=True
        )
    ]
    x, a, s, ds = map(take.matrix, (x_MK, a_RK, s_MR, ds_MR))
    cpu_extension.load().backward(
        x, a, s, ds, take.maybe(dx_MK), take.maybe(da_RK), siblings, torch.get_num_threads()
    )
    dws_NK = each(need_w, lambda dy, b: dy.T @ x_MK)
    dbiases_N = each(need_bias, lambda dy, b: dy.sum(0))
    grads = (dx_MK, da_RK, *dws_NK, *dbiases_N, *dbs_NR)
    return [x_MK.new_empty(0) if grad is None else grad for grad in grads]
