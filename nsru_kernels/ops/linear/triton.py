"""y = x Wᵀ + b + s S Bᵀ and its gradients by Triton kernels: the same functions as reference.py.

Forward, by plan:
    decode         M ≤ 16: one launch for S and y
    kext           S, then one GEMM [x ∣ S]·[W ∣ sB]ᵀ with two operand sources
    kext_tma       the same by TMA descriptors and persistent programs, sm_90 and newer
    expand_first   S by our kernel, then library GEMMs: y = s S Bᵀ + b, y += x Wᵀ
Backward: dS and dB from one read of dY; dĀ from one read of x; dX by the same GEMM,
[dY ∣ dS]·[W ; sĀ]. Dropout masks are recomputed from the seed. Sums are in a fixed order.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
from torch import Tensor

from nsru_kernels.ops import launch
from nsru_kernels.ops.launch import Config
from nsru_kernels.ops.linear import triton_gemm_kernels as gemm_kernels
from nsru_kernels.ops.linear.triton_products import (
    ARCHITECTURES,
    MAX_BLOCK_R,
    aligned,
    columns_product,
    fits_tma,
    kext_gemm,
    packed,
    rows_product,
)
from nsru_kernels.ops.products import one_read_pays

PLANS = ("decode", "kext_tma", "kext", "expand_first")
DECODE_TOKENS = launch.LEAST_TILE


def _decoding(n: int, k: int, stages: int) -> Config:
    return Config({"BLOCK_N": n, "BLOCK_K": k}, 4, stages)


DECODE = {arch: (_decoding(32, 128, 4), _decoding(16, 256, 4)) for arch in ARCHITECTURES}
SMALL_DECODE = (_decoding(16, 64, 3),)


def forward(
    x_MK: Tensor,
    w_NK: Tensor,
    a_RK: Tensor,
    b_NR: Tensor,
    bias_N: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    plan: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [M, N], S [M, R]); see reference.py.

    ``plan`` is one of PLANS, measured at sizes near these. Where it cannot serve, or without one,
    the first of PLANS does that can.
    """
    launch.check_dtypes("nsru_linear", x_MK)
    a_RK, b_NR = a_RK.contiguous(), b_NR.contiguous()
    if plan is None or not serves(plan, x_MK, w_NK, a_RK, dropout_p):
        plan = next(fit for fit in PLANS if serves(fit, x_MK, w_NK, a_RK, dropout_p))
    if plan == "decode":
        return _decode(x_MK, w_NK, a_RK, b_NR, bias_N, scaling)
    s_MR = rows_product(x_MK, a_RK.T, dropout_p, seed)
    if plan == "expand_first":
        y_MN = F.linear(s_MR, scaling * b_NR, bias_N)
        return y_MN.addmm_(x_MK, w_NK.T), s_MR
    return kext_gemm(x_MK, w_NK.T, s_MR, b_NR.T, bias_N, scaling, tma=plan == "kext_tma"), s_MR


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
    launch.check_dtypes("nsru_linear", x_MK)
    need_x, need_w, need_bias, need_a, need_b = needs
    a_RK, b_NR, s_MR = a_RK.contiguous(), b_NR.contiguous(), s_MR.contiguous()
    dx, dw, dbias, da, db = (dy_MN.new_empty(0) for _ in needs)
    ds_MR = s_MR.new_empty(s_MR.shape)
    need_ds = need_x or need_a
    together = need_b and need_ds and one_read_pays(b_NR.shape[1])
    if need_ds and not together:
        rows_product(dy_MN, b_NR, out=ds_MR)
    if need_b:
        rows_out = ds_MR if together else None
        db = columns_product(dy_MN, s_MR, scaling, rank_first=False, v_CR=b_NR, rows_out=rows_out)
    if need_x:
        tma = fits_tma(dy_MN, w_NK)
        dx = kext_gemm(dy_MN, w_NK, ds_MR, a_RK, None, scaling, dropout_p, seed, tma=tma)
    if need_a:
        da = columns_product(x_MK, ds_MR, scaling, dropout_p, seed, rank_first=True)
    if need_w:
        dw = dy_MN.T @ x_MK
    if need_bias:
        dbias = dy_MN.sum(0)
    return [dx, dw, dbias, da, db]


def serves(plan: str, x_MK: Tensor, w_NK: Tensor, a_RK: Tensor, dropout_p: float = 0.0) -> bool:
    """Whether ``plan`` can compute this call."""
    if plan == "decode":
        few = x_MK.shape[0] <= DECODE_TOKENS and a_RK.shape[0] <= MAX_BLOCK_R
        return few and not dropout_p
    return plan in PLANS and (plan != "kext_tma" or fits_tma(x_MK, w_NK))


def _decode(
    x_MK: Tensor,
    w_NK: Tensor,
    a_RK: Tensor,
    b_NR: Tensor,
    bias_N: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    (m, k), (n, r) = x_MK.shape, b_NR.shape
    y_MN, s_MR = x_MK.new_empty(m, n), x_MK.new_empty(m, r)
    if not m or not n:
        return y_MN, s_MR

    def run(config: Config) -> tuple[Tensor, Tensor]:
        gemm_kernels.decode_kernel[(triton.cdiv(n, config.blocks["BLOCK_N"]),)](
            x_MK, w_NK, a_RK, b_NR, packed(bias_N), y_MN, s_MR, m, n, k, r, *x_MK.stride(),
            *w_NK.stride(), scaling, launch.dot_precision(x_MK.dtype),
            BLOCK_M=DECODE_TOKENS, BLOCK_R=launch.padded(r), **config.options,
        )  # fmt: skip
        return y_MN, s_MR

    configs: tuple[Config, ...] = SMALL_DECODE
    if x_MK.dtype.itemsize == 2 and aligned(x_MK) and aligned(w_NK):
        configs = DECODE[launch.architecture(x_MK.device)]
    return launch.tuned(configs, ("decode", x_MK.dtype, k, n, r), x_MK, run)
