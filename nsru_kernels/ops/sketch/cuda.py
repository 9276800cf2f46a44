"""The sketch update with the CUDA extension: one launch that reads x from memory once, the second
time from L2; see README.md.

x that is not row-major, or whose rows do not start at 16 bytes, is copied; nothing else of size M
is. Widths beyond 192 take several column tiles of the same kernel, each of which reads x from L2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsru_kernels.dispatch import extension
from nsru_kernels.dispatch.config import BackendUnavailable
from nsru_kernels.dispatch.extension import ALIGNED, DTYPES, SHORT, row_major

# Two panels of x are to stay in L2 together (40 MiB on A100, 50 MiB on H100). Not measured.
_PANEL_BYTES = 16 << 20


def update_sketch(
    x_MK: Tensor,
    omega_KL: Tensor,
    y_KL: Tensor,
    h_LL: Tensor,
    mask_M: Tensor | None,
    split: bool,
    limit: float,
) -> Tensor:
    """As reference.py; y and h are left alone by the device, the host waits for nothing.

    Raises:
        BackendUnavailable: x is not bf16 or fp16, its features are no multiple of 8, or the
            accumulators are fp64.
    """
    _check(x_MK, y_KL)
    (m, k), width = x_MK.shape, y_KL.shape[1]
    if not x_MK.numel():
        return torch.zeros((), dtype=torch.float64, device=x_MK.device)
    x_MK = row_major(x_MK)
    omega_KL = omega_KL.to(x_MK.dtype)
    if width % ALIGNED:
        omega_KL = F.pad(omega_KL, (0, -width % ALIGNED))
    omega_KL = row_major(omega_KL)
    mask_M = None if mask_M is None else mask_M.contiguous()
    trace = x_MK.new_empty((), dtype=torch.float64)
    extension.launch(
        "sketch_update",
        x_MK,
        x=x_MK.data_ptr(),
        omega=omega_KL.data_ptr(),
        mask=0 if mask_M is None else mask_M.data_ptr(),
        y=y_KL.data_ptr(),
        h=h_LL.data_ptr(),
        trace=trace.data_ptr(),
        m=m,
        k=k,
        l=width,
        ldx=x_MK.stride(0),
        ldomega=omega_KL.stride(0),
        split=split,
        limit=limit,
        panel_bytes=_PANEL_BYTES,
        dtype=DTYPES[x_MK.dtype],
    )
    return trace


def _check(x_MK: Tensor, y_KL: Tensor) -> None:
    """Refuse what the kernel cannot take. Raises BackendUnavailable."""
    reason, other = None, "triton"
    if y_KL.dtype != torch.float32:
        reason, other = f"the kernel accumulates in float32, y and h are {y_KL.dtype}", "eager"
    elif x_MK.dtype not in SHORT:
        reason = f"the kernel takes bf16 and fp16, got {x_MK.dtype}"
        other = "eager" if x_MK.dtype == torch.float64 else "triton"
    elif x_MK.shape[1] % ALIGNED:
        reason = f"the features of x must be a multiple of 8, got {tuple(x_MK.shape)}"
    if reason is not None:
        raise BackendUnavailable(
            f"backend='cuda' cannot serve update_sketch: {reason}. Use '{other}'."
        )
