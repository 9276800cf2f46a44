"""The products of the projected linear by the CUDA extension: addresses, sizes, workspaces."""

from __future__ import annotations

import torch
from torch import Tensor

from nsru_kernels.dispatch import extension
from nsru_kernels.dispatch.config import BackendUnavailable
from nsru_kernels.dispatch.extension import ALIGNED, DTYPES, has_wide_rows

CHOOSE = -1  # the extension picks a config by the number of output tiles
# As csrc/host/kext_plan.h has them, in its order.
CONFIGS = ("128x256x64_2x1_cooperative", "128x128x64_2x1_pingpong")
SWIZZLES = (1, 2, 4, 8)


def gemm_choice(tiles: str) -> dict[str, int]:
    """``config`` and ``swizzle`` of ``kext_gemm`` as plan tables name them; none for other names.

    Examples:
        >>> gemm_choice("128x128x64_2x1_pingpong/4")
        {'config': 1, 'swizzle': 4}
        >>> gemm_choice("of a later version")
        {}
    """
    name, _, swizzle = tiles.partition("/")
    if name not in CONFIGS or swizzle not in map(str, SWIZZLES):
        return {}
    return {"config": CONFIGS.index(name), "swizzle": int(swizzle)}


def kext_gemm(
    x_MK: Tensor,
    w_KN: Tensor,
    p_MR: Tensor,
    v_RN: Tensor,
    bias_N: Tensor | None,
    *,
    config: int = CHOOSE,
    swizzle: int = 1,
    after_narrow: bool = False,
) -> Tensor:
    """X W + P V + bias [M, N] in X's dtype: one launch, nothing of size M read twice.

    Args:
        x_MK, p_MR: rows contiguous and 16-byte aligned.
        w_KN, v_RN: both contiguous along K and R, or both along N; 16-byte aligned.
        config: index into the extension's configs; CHOOSE for one that fits the sizes.
        swizzle: tiles that neighbouring clusters share through L2: 1, 2, 4 or 8.
        after_narrow: the narrow product that makes P was enqueued last, and nothing else that is
            read here is younger: the GEMM starts on X and W while that product ends. Kernels that
            read and write nothing of the operands may lie between.

    Raises:
        ValueError: naming the argument and its value.
    """
    (m, k), n, r = x_MK.shape, w_KN.shape[1], p_MR.shape[1]
    out_MN = x_MK.new_empty(m, n)
    if not m:
        return out_MN
    if bias_N is not None and (bias_N.stride(0) != 1 or bias_N.data_ptr() % 16):
        bias_N = bias_N.clone(memory_format=torch.contiguous_format)
        after_narrow = False
    along_n = w_KN.stride(1) == 1
    w, v = (w_KN, v_RN) if along_n else (w_KN.T, v_RN.T)
    extension.launch(
        "kext_gemm",
        x_MK,
        **_matrices("kext_gemm", x=x_MK, w=w, p=p_MR, v=v),
        dtype=DTYPES[x_MK.dtype],
        bias=0 if bias_N is None else bias_N.data_ptr(),
        out=out_MN.data_ptr(),
        ldo=n,
        m=m,
        n=n,
        k=k,
        r=r,
        layout="KN" if along_n else "NK",
        config=config,
        swizzle=swizzle,
        after_narrow=after_narrow,
    )
    return out_MN


def columns_product(
    x_MC: Tensor,
    p_MR: Tensor,
    scaling: float,
    *,
    v_CR: Tensor,
    rows_out: Tensor,
    rows_scaling: float = 1.0,
) -> Tensor:
    """scaling · Xᵀ P [C, R], and rows_out = rows_scaling · X V, from one read of X.

    Rows of X and P are contiguous and aligned, those of V [C, R] and rows_out [M, R] contiguous.
    R is one of ``products.one_read_pays``.
    """
    (m, c), r = x_MC.shape, p_MR.shape[1]
    d_CR = x_MC.new_empty(c, r)
    if not m:
        return d_CR.zero_()
    extension.launch(
        "columns_product",
        x_MC,
        **_matrices("columns_product", x=x_MC, p=p_MR, v=v_CR, rows=rows_out),
        dtype=DTYPES[x_MC.dtype],
        d=d_CR.data_ptr(),
        m=m,
        c=c,
        r=r,
        scaling=scaling,
        rows_scaling=rows_scaling,
    )
    return d_CR


def check_operands(op: str, x_MC: Tensor, w_NK: Tensor, dropout_p: float = 0.0) -> None:
    """Refuse what the kernels cannot take of ``op``. Raises BackendUnavailable."""
    reason = None
    if x_MC.dtype not in DTYPES:
        reason = f"the kernels take bf16 and fp16, got {x_MC.dtype}"
    elif dropout_p:
        reason = f"the GEMM has no dropout mask, got dropout_p={dropout_p}"
    elif any(size % ALIGNED or not size for size in w_NK.shape):
        reason = f"in_features and out_features must be multiples of 8, got {tuple(w_NK.shape)}"
    elif not has_wide_rows(w_NK):
        reason = (
            f"rows of weight must be contiguous and start at multiples of 16 bytes, got strides "
            f"{w_NK.stride()} at address {w_NK.data_ptr()}"
        )
    if reason is not None:
        raise BackendUnavailable(f"backend='cuda' cannot serve {op}: {reason}. Use 'triton'.")


def padded(matrix: Tensor, scaling: float = 1.0) -> Tensor:
    """scaling · matrix in rows that start at 16 bytes; the matrix itself where nothing changes."""
    rows, columns = matrix.shape
    if scaling == 1.0 and not columns % ALIGNED and has_wide_rows(matrix):
        return matrix
    result = matrix.new_empty(rows, -(-columns // ALIGNED) * ALIGNED)[:, :columns]
    return torch.mul(matrix, scaling, out=result)


def _matrices(function: str, **matrices: Tensor) -> dict[str, int]:
    """Addresses and leading dimensions. Raises ValueError where a matrix is not row-major."""
    x = matrices["x"]
    for name, tensor in matrices.items():
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(
                f"{function}: {name} must be row-major, got strides {tensor.stride()}."
            )
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{function}: {name} is {tensor.dtype} on {tensor.device}, x {x.dtype} on "
                f"{x.device}."
            )
    return {
        **{name: tensor.data_ptr() for name, tensor in matrices.items()},
        **{f"ld{name}": tensor.stride(0) for name, tensor in matrices.items()},
    }
