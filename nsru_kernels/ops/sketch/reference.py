"""Eager definition of the sketch update; every device, every floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def update_sketch(
    x_MK: Tensor,
    omega_KL: Tensor,
    y_KL: Tensor,
    h_LL: Tensor,
    mask_M: Tensor | None,
    split: bool,
    limit: float,
) -> Tensor:
    if mask_M is not None:
        x_MK = x_MK[mask_M]
    with torch.autocast(x_MK.device.type, enabled=False):
        wide_MK = x_MK.to(y_KL.dtype)
        trace = token_energy(wide_MK).sum()
        if trace < limit:
            s_ML = wide_MK @ omega_KL.to(x_MK.dtype).to(y_KL.dtype)
            s_ML = _rounded(s_ML, x_MK.dtype, split)
            y_KL.addmm_(wide_MK.T, s_ML)
            h_LL.addmm_(s_ML.T, s_ML)
    return trace


def token_energy(wide_MK: Tensor) -> Tensor:
    """‖x‖² of each row, fp64 [M]."""
    # The sum along K is a cascade of about 1e-7; vector_norm adds in sequence and is 1e-6 low in
    # bf16, which would lift every certificate by as much.
    return wide_MK.square().sum(dim=1).double()


def _rounded(s_ML: Tensor, dtype: torch.dtype, split: bool) -> Tensor:
    """S as a kernel keeps it in `dtype`: one number an entry, or the sum of two."""
    if dtype.itemsize >= s_ML.element_size():
        return s_ML
    limits = torch.finfo(dtype)
    # Saturation keeps fp16 finite; whatever S holds, the estimate stays below xᵀ x.
    s_ML = s_ML.clamp(limits.min, limits.max)
    high_ML = s_ML.to(dtype).to(s_ML.dtype)
    return high_ML + (s_ML - high_ML).to(dtype).to(s_ML.dtype) if split else high_ML
