"""Eager definition of the sketch update; every device, every floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def update_sketch(
    x_MK: Tensor, omega_KL: Tensor, y_KL: Tensor, h_LL: Tensor, mask_M: Tensor | None
) -> None:
    if mask_M is not None:
        x_MK = x_MK[mask_M]
    limits = torch.finfo(x_MK.dtype)
    with torch.autocast(x_MK.device.type, enabled=False):
        wide_MK = x_MK.to(y_KL.dtype)
        # Saturation keeps fp16 finite; whatever S holds, the estimate stays below xᵀ x.
        s_ML = (wide_MK @ omega_KL.to(y_KL.dtype)).clamp_(limits.min, limits.max)
        s_ML = s_ML.to(x_MK.dtype).to(y_KL.dtype)
        y_KL.addmm_(wide_MK.T, s_ML)
        h_LL.addmm_(s_ML.T, s_ML)
