"""y = x Wᵀ + b + s S Bᵀ and its gradients with the CUDA extension: the functions of reference.py.

Forward: S by a library GEMM, then one GEMM [x ∣ S]·[W ∣ sB]ᵀ + b for sm_90a.
Backward: dX by the same GEMM, [dY ∣ dS]·[W ; sĀ]; dS, dB and dĀ by library GEMMs.
Nothing of size M is copied, unless x or dY is not row-major. R-sized operands whose rows would not
start at 16 bytes are copied into padded rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsru_kernels.config import BackendUnavailable
from nsru_kernels.ops import extension
from nsru_kernels.ops.products import scaled_product

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# Elements in 16 bytes, TMA's unit for addresses and for distances between rows.
ALIGNED = 8
CHOOSE = -1  # the extension picks a config by the number of output tiles


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
    _check(x_MK, w_NK, dropout_p)
    x_MK = _row_major(x_MK)
    s_MR = F.linear(x_MK, a_RK)
    y_MN = kext_gemm(x_MK, w_NK.T, _padded(s_MR), _padded(b_NR, scaling).T, bias_N)
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
    """[dX, dW, dbias, dĀ, dB] in x's dtype; an empty tensor where ``needs`` is False."""
    _check(dy_MN, w_NK, dropout_p)
    need_x, need_w, need_bias, need_a, need_b = needs
    dx, dw, dbias, da, db = (dy_MN.new_empty(0) for _ in needs)
    if need_x or need_a:
        ds_MR = dy_MN @ b_NR
    if need_x:
        dx = kext_gemm(_row_major(dy_MN), w_NK, _padded(ds_MR), _padded(a_RK, scaling), None)
    if need_w:
        dw = dy_MN.T @ x_MK
    if need_bias:
        dbias = dy_MN.sum(0)
    if need_a:
        da = scaled_product(ds_MR.T, x_MK, scaling)
    if need_b:
        db = scaled_product(dy_MN.T, s_MR, scaling)
    return [dx, dw, dbias, da, db]


def kext_gemm(
    x_MK: Tensor,
    w_KN: Tensor,
    p_MR: Tensor,
    v_RN: Tensor,
    bias_N: Tensor | None,
    *,
    config: int = CHOOSE,
    swizzle: int = 1,
) -> Tensor:
    """X W + P V + bias [M, N] in X's dtype: one launch, nothing of size M read twice.

    Args:
        x_MK, p_MR: rows contiguous and 16-byte aligned.
        w_KN, v_RN: both contiguous along K and R, or both along N; 16-byte aligned.
        config: index into the extension's configs; CHOOSE for one that fits the sizes.
        swizzle: tiles that neighbouring clusters share through L2: 1, 2, 4 or 8.
    Raises:
        ValueError: naming the argument and its value.
    """
    (m, k), n, r = x_MK.shape, w_KN.shape[1], p_MR.shape[1]
    out_MN = x_MK.new_empty(m, n)
    if not m:
        return out_MN
    if bias_N is not None and (bias_N.stride(0) != 1 or bias_N.data_ptr() % 16):
        bias_N = bias_N.clone(memory_format=torch.contiguous_format)
    module = extension.load()
    along_n = w_KN.stride(1) == 1
    w, v = (w_KN, v_RN) if along_n else (w_KN.T, v_RN.T)
    inner = {"x": x_MK, "w": w, "p": p_MR, "v": v}
    for name, tensor in inner.items():
        if tensor.stride(1) != 1:
            raise ValueError(f"kext_gemm: {name} must be row-major, got strides {tensor.stride()}.")
        if tensor.dtype != x_MK.dtype or tensor.device != x_MK.device:
            raise ValueError(
                f"kext_gemm: {name} is {tensor.dtype} on {tensor.device}, x {x_MK.dtype} on "
                f"{x_MK.device}."
            )
    call = {
        **{name: tensor.data_ptr() for name, tensor in inner.items()},
        **{f"ld{name}": tensor.stride(0) for name, tensor in inner.items()},
        "bias": 0 if bias_N is None else bias_N.data_ptr(),
        "out": out_MN.data_ptr(),
        "ldo": n,
        "m": m,
        "n": n,
        "k": k,
        "r": r,
        "dtype": DTYPES[x_MK.dtype],
        "layout": "KN" if along_n else "NK",
        "config": config,
        "swizzle": swizzle,
        "device": x_MK.device.index,
        "stream": torch.cuda.current_stream(x_MK.device).cuda_stream,
    }
    size = module.kext_gemm_workspace(**call)
    workspace = x_MK.new_empty(size, dtype=torch.uint8)
    module.launch_kext_gemm(**call, workspace=workspace.data_ptr(), workspace_bytes=size)
    return out_MN


def _check(x_MC: Tensor, w_NK: Tensor, dropout_p: float) -> None:
    """Refuse what the GEMM cannot take. Raises BackendUnavailable."""
    reason = None
    if x_MC.dtype not in DTYPES:
        reason = f"the GEMM takes bf16 and fp16, got {x_MC.dtype}"
    elif dropout_p:
        reason = f"the GEMM has no dropout mask, got dropout_p={dropout_p}"
    elif any(size % ALIGNED or not size for size in w_NK.shape):
        reason = f"in_features and out_features must be multiples of 8, got {tuple(w_NK.shape)}"
    elif w_NK.stride(1) != 1 or not _aligned(w_NK):
        reason = (
            f"rows of weight must be contiguous and start at multiples of 16 bytes, got strides "
            f"{w_NK.stride()} at address {w_NK.data_ptr()}"
        )
    if reason is not None:
        raise BackendUnavailable(
            f"backend='cuda' cannot serve nsru_linear: {reason}. Use 'triton'."
        )


def _aligned(matrix: Tensor) -> bool:
    return matrix.stride(0) % ALIGNED == 0 and matrix.data_ptr() % 16 == 0


def _row_major(matrix: Tensor) -> Tensor:
    """``matrix`` where TMA can read it, as a rule; a copy of a transposed or expanded one."""
    rows_fit = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    if rows_fit and _aligned(matrix):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def _padded(matrix: Tensor, scaling: float = 1.0) -> Tensor:
    """scaling · matrix in rows that start at 16 bytes; the matrix itself where nothing changes."""
    if scaling == 1.0 and matrix.is_contiguous() and _aligned(matrix):
        return matrix
    rows, columns = matrix.shape
    padded = matrix.new_empty(rows, -(-columns // ALIGNED) * ALIGNED)[:, :columns]
    return torch.mul(matrix, scaling, out=padded)
