"""The functions of reference.py by Triton kernels.

Forward: S of all linears from one read of x (plan decode: in the same launch as y); then for each
linear, by plan:
    decode         M ≤ 16: one launch for its part of S and y
    kext           one GEMM [x ∣ S]·[W ∣ sB]ᵀ with two operand sources
    kext_tma       the same by TMA descriptors and persistent programs, sm_90 and newer
    expand_first   library GEMMs: y = s S Bᵀ + b, y += x Wᵀ
Backward: dS_i and dB_i from one read of dY_i; dĀ from one read of x; dX of up to three linears by
the same GEMM, [dY_1 ∣ dY_2 ∣ dY_3 ∣ dS]·[W_1 ; W_2 ; W_3 ; Ā], so that no sum of gradients is
written and read again; by plan expand_first dX = dS Ā, dX += dY_i W_i by library GEMMs. Dropout
masks are recomputed from the seed. Sums are in a fixed order.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
from torch import Tensor

from nsru_kernels.dispatch import launch
from nsru_kernels.dispatch.launch import Config
from nsru_kernels.ops.linear import triton_gemm_kernels as gemm_kernels
from nsru_kernels.ops.linear.triton_products import (
    MAX_BLOCK_R,
    SOURCES,
    aligned,
    columns_product,
    fits_tma,
    kext_gemm,
    packed,
    shrink,
)
from nsru_kernels.ops.products import (
    frozen_gradients,
    input_gradient,
    one_read_pays,
    public_name,
    rank_columns,
)

PLANS = ("decode", "kext_tma", "kext", "expand_first")
DECODE_TOKENS = launch.LEAST_TILE


def _decoding(n: int, k: int, stages: int) -> Config:
    return Config({"BLOCK_N": n, "BLOCK_K": k}, 4, stages)


# The second takes 144 KiB at R = 64 in four stages, 96 in three.
DECODE = {
    arch: (_decoding(32, 128, 4), _decoding(16, 256, 3 if arch == 86 else 4))
    for arch in launch.ARCHITECTURES
}
SMALL_DECODE = (_decoding(16, 64, 3),)


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

    ``plan`` is one of PLANS. Where it cannot serve, or without one, the first that can does.
    """
    launch.check_dtypes(public_name(ws_NK), x_MK)
    a_RK, bs_NR = a_RK.contiguous(), [b_NR.contiguous() for b_NR in bs_NR]
    if plan is None or not serves(plan, x_MK, ws_NK, bs_NR, dropout_p):
        plan = next(fit for fit in PLANS if serves(fit, x_MK, ws_NK, bs_NR, dropout_p))
    if plan == "decode":
        s_MR = x_MK.new_empty(x_MK.shape[0], a_RK.shape[0])
        parts = a_RK.split_with_sizes([b_NR.shape[1] for b_NR in bs_NR])
    else:
        s_MR = shrink(x_MK, a_RK.T, dropout_p, seed)
        parts = (a_RK,) * len(bs_NR)
    ys = []
    for w_NK, s, part, b_NR, bias_N, scaling in zip(
        ws_NK, rank_columns(s_MR, bs_NR), parts, bs_NR, biases_N, scalings, strict=True
    ):
        if plan == "decode":
            y_MN = _decode(x_MK, w_NK, part, b_NR, bias_N, scaling, s)
        elif plan == "expand_first":
            y_MN = F.linear(s, scaling * b_NR, bias_N).addmm_(x_MK, w_NK.T)
        else:
            tma = plan == "kext_tma"
            y_MN = kext_gemm([x_MK], [w_NK.T], s, b_NR.T, bias_N, scaling, tma=tma)
        ys.append(y_MN)
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
    """[dX, dĀ, *dW, *dbias, *dB], dĀ and dB in float32, the others in x's dtype; None where not
    needed or not used.

    ``plan`` is as in ``forward``.
    """
    launch.check_dtypes(public_name(ws_NK), x_MK)
    need_x, need_a = needs[:2]
    need_ds, need_b = need_x or need_a, needs[2 + 2 * len(ws_NK) :]
    dx: Tensor | None = None
    da: Tensor | None = None
    dbs: list[Tensor | None] = [None] * len(bs_NR)
    a_RK, s_MR = a_RK.contiguous(), s_MR.contiguous()
    ds_MR = s_MR.new_empty(s_MR.shape)
    columns = zip(rank_columns(s_MR, bs_NR), rank_columns(ds_MR, bs_NR), strict=True)
    for i, (s, ds) in enumerate(columns):
        dy_MN, b_NR, scaling = dys_MN[i], bs_NR[i].contiguous(), scalings[i]
        if dy_MN is None:
            ds.zero_()
            continue
        together = need_b[i] and need_ds and one_read_pays(b_NR.shape[1])
        if need_ds and not together:
            shrink(dy_MN, b_NR, scaling=scaling, out=ds)
        if need_b[i]:
            dbs[i] = columns_product(
                dy_MN, s, scaling, rank_first=False, v_CR=b_NR,
                rows_out=ds if together else None, rows_scaling=scaling,
            )  # fmt: skip
    if need_x and plan == "expand_first" and not dropout_p:
        dx = input_gradient(dys_MN, ws_NK, ds_MR, a_RK)
    elif need_x:
        dx = _input_gradient(dys_MN, ws_NK, ds_MR, a_RK, dropout_p, seed, plan)
    if need_a:
        da = columns_product(x_MK, ds_MR, 1.0, dropout_p, seed, rank_first=True)
    return [dx, da, *frozen_gradients(dys_MN, x_MK, needs), *dbs]


def serves(
    plan: str, x_MK: Tensor, ws_NK: list[Tensor], bs_NR: list[Tensor], dropout_p: float = 0.0
) -> bool:
    """True where ``plan`` can compute this call."""
    if plan == "decode":
        few = x_MK.shape[0] <= DECODE_TOKENS
        return few and not dropout_p and all(b.shape[1] <= MAX_BLOCK_R for b in bs_NR)
    return plan in PLANS and (plan != "kext_tma" or all(fits_tma(x_MK, w) for w in ws_NK))


def _input_gradient(
    dys_MN: list[Tensor | None],
    ws_NK: list[Tensor],
    ds_MR: Tensor,
    a_RK: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    plan: str | None,
) -> Tensor:
    """Σ dY_i W_i + drop(dS Ā): by TMA where that can be, unless the plan is kext; linears beyond
    the third are added by library GEMMs."""
    used = [(dy, w) for dy, w in zip(dys_MN, ws_NK, strict=True) if dy is not None]
    if not used:
        return ds_MR.new_zeros(ds_MR.shape[0], a_RK.shape[1])
    dys, ws = zip(*used[:SOURCES], strict=True)
    tma = plan != "kext" and all(map(fits_tma, dys, ws))
    dx_MK = kext_gemm(dys, ws, ds_MR, a_RK, None, 1.0, dropout_p, seed, tma=tma)
    for dy_MN, w_NK in used[SOURCES:]:
        dx_MK.addmm_(dy_MN, w_NK)
    return dx_MK


def _decode(
    x_MK: Tensor,
    w_NK: Tensor,
    a_RK: Tensor,
    b_NR: Tensor,
    bias_N: Tensor | None,
    scaling: float,
    s_MR: Tensor,
) -> Tensor:
    (m, k), (n, r) = x_MK.shape, b_NR.shape
    y_MN = x_MK.new_empty(m, n)
    if not m or not n:
        return y_MN

    def run(config: Config) -> Tensor:
        gemm_kernels.decode_kernel[(triton.cdiv(n, config.blocks["BLOCK_N"]),)](
            x_MK, w_NK, a_RK, b_NR, packed(bias_N), y_MN, s_MR, m, n, k, r, *x_MK.stride(),
            *w_NK.stride(), s_MR.stride(0), scaling, launch.dot_precision(x_MK.dtype),
            BLOCK_M=DECODE_TOKENS, BLOCK_R=launch.padded(r), **config.options,
        )  # fmt: skip
        return y_MN

    configs: tuple[Config, ...] = SMALL_DECODE
    if x_MK.dtype.itemsize == 2 and aligned(x_MK) and aligned(w_NK):
        configs = DECODE[launch.architecture(x_MK.device)]
    return launch.tuned(configs, ("decode", x_MK.dtype, k, n, r), x_MK, run)
