"""y = x Wᵀ + b + s S Bᵀ and its gradients on a CPU with AMX: a group of one, bf16, no dropout."""

from __future__ import annotations

from torch import Tensor

from nsru_kernels.ops.cpu_extension import check_operands
from nsru_kernels.ops.linear_group import cpu as group


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
    check_operands("nsru_linear", x_MK, dropout_p)
    ys, s_MR = group.forward(x_MK, [w_NK], a_RK, [b_NR], [bias_N], [scaling])
    return ys[0], s_MR


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
    """[dX, dW, dbias, dĀ, dB], dĀ and dB in float32; an empty tensor where ``needs`` is False."""
    check_operands("nsru_linear", dy_MN, dropout_p)
    need_x, need_w, need_bias, need_a, need_b = needs
    order = [need_x, need_a, need_w, need_bias, need_b]
    dx, da, dw, dbias, db = group.backward(
        [dy_MN], x_MK, [w_NK], a_RK, [b_NR], s_MR, [scaling], order
    )
    return [dx, dw, dbias, da, db]
