"""The functions of reference.py on a CPU with AMX, bf16 only. The products are in
csrc/cpu/linear.h."""

from __future__ import annotations

import torch
from torch import Tensor

from nsru_kernels.dispatch import cpu_extension
from nsru_kernels.dispatch.cpu_extension import Arguments, check_operands
from nsru_kernels.ops.products import frozen_gradients


def forward(
    x_MK: Tensor,
    ws_NK: list[Tensor],
    a_RK: Tensor,
    bs_NR: list[Tensor],
    biases_N: list[Tensor | None],
    scalings: list[float],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """([y_i [M, N_i]], S [M, ΣR]); see reference.py."""
    check_operands(x_MK, dropout_p)
    m = x_MK.shape[0]
    s_MR = x_MK.new_empty(m, a_RK.shape[0])
    ys = [x_MK.new_empty(m, w_NK.shape[0]) for w_NK in ws_NK]
    take = Arguments()
    linears = [
        (take.matrix(w_NK), take.matrix(b_NR), scaling, take.vector(bias_N), take.matrix(y_MN))
        for w_NK, b_NR, scaling, bias_N, y_MN in zip(
            ws_NK, bs_NR, scalings, biases_N, ys, strict=True
        )
    ]
    x, a, s = map(take.matrix, (x_MK, a_RK, s_MR))
    cpu_extension.load().forward(x, a, s, linears, torch.get_num_threads())
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
) -> list[Tensor | None]:
    """[dX, dĀ, *dW, *dbias, *dB], dĀ and dB in float32; None where not needed or not used."""
    check_operands(x_MK, dropout_p)
    need_x, need_a = needs[:2]
    need_b = needs[2 + 2 * len(ws_NK) :]
    # Columns that belong to an output nobody used stay zero.
    unused = any(dy_MN is None for dy_MN in dys_MN)
    ds_MR = s_MR.new_zeros(s_MR.shape) if unused else s_MR.new_empty(s_MR.shape)
    dx_MK = x_MK.new_empty(x_MK.shape) if need_x else None
    da_RK = a_RK.new_empty(a_RK.shape, dtype=torch.float32) if need_a else None
    dbs_NR = [
        b_NR.new_empty(b_NR.shape, dtype=torch.float32) if need and dy_MN is not None else None
        for need, dy_MN, b_NR in zip(need_b, dys_MN, bs_NR, strict=True)
    ]
    take = Arguments()
    linears = [
        (take.matrix(w_NK), take.matrix(b_NR), scaling, take.maybe(dy_MN), take.maybe(db_NR))
        for w_NK, b_NR, scaling, dy_MN, db_NR in zip(
            ws_NK, bs_NR, scalings, dys_MN, dbs_NR, strict=True
        )
    ]
    x, a, s, ds = map(take.matrix, (x_MK, a_RK, s_MR, ds_MR))
    cpu_extension.load().backward(
        x, a, s, ds, take.maybe(dx_MK), take.maybe(da_RK), linears, torch.get_num_threads()
    )
    return [dx_MK, da_RK, *frozen_gradients(dys_MN, x_MK, needs), *dbs_NR]
