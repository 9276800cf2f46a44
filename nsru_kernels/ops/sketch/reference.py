"""The sketch update by library GEMMs; every device, every floating dtype.

On a GPU 16-bit activations are multiplied as they are, with float32 sums, and the host waits for
nothing; everywhere else the products are in the accumulators' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsru_kernels.dispatch.precision import full_float32


def update_sketch(
    x_MK: Tensor,
    omega_KL: Tensor,
    y_KL: Tensor,
    h_LL: Tensor,
    mask_M: Tensor | None,
    split: bool,
    limit: float,
) -> Tensor:
    with torch.autocast(x_MK.device.type, enabled=False), full_float32(x_MK.device):
        if multiplies_short(x_MK, y_KL):
            return update_short(x_MK, omega_KL, y_KL, h_LL, mask_M, split, limit)
        return update_wide(x_MK, omega_KL, y_KL, h_LL, mask_M, split, limit)


def multiplies_short(x_MK: Tensor, y_KL: Tensor) -> bool:
    """True where the library multiplies 16-bit matrices into float32 ones: on a GPU, by a PyTorch
    whose ``torch.mm`` has ``out_dtype``."""
    return x_MK.is_cuda and x_MK.dtype.itemsize == 2 and y_KL.dtype == torch.float32 and _HAS_SHORT


_HAS_SHORT = hasattr(torch.ops.aten.mm, "dtype")


def update_wide(
    x_MK: Tensor,
    omega_KL: Tensor,
    y_KL: Tensor,
    h_LL: Tensor,
    mask_M: Tensor | None,
    split: bool,
    limit: float,
) -> Tensor:
    """The update by products in the accumulators' dtype, its definition. The host decides whether
    a batch is added."""
    if mask_M is not None:
        x_MK = x_MK[mask_M]
    wide_MK = x_MK.to(y_KL.dtype)
    trace = token_energy(wide_MK).sum()
    if trace < limit:
        s_ML = wide_MK @ omega_KL.to(x_MK.dtype).to(y_KL.dtype)
        s_ML = _rounded(s_ML, x_MK.dtype, split)
        y_KL.addmm_(wide_MK.T, s_ML)
        h_LL.addmm_(s_ML.T, s_ML)
    return trace


def update_short(
    x_MK: Tensor,
    omega_KL: Tensor,
    y_KL: Tensor,
    h_LL: Tensor,
    mask_M: Tensor | None,
    split: bool,
    limit: float,
) -> Tensor:
    """The update by products of x's own 16 bits. The device decides whether a batch is added."""
    if mask_M is not None:  # picking rows would tell the host how many there are
        x_MK = torch.where(mask_M[:, None], x_MK, 0)
    # One read and no copy of x: on a GPU the sum of a row is a tree.
    trace = torch.linalg.vector_norm(x_MK, dim=1, dtype=torch.float32).double().square().sum()
    s_ML = _product(x_MK, omega_KL.to(x_MK.dtype)) if split else x_MK @ omega_KL.to(x_MK.dtype)
    s_MP = torch.cat(_planes(s_ML, x_MK.dtype, split), dim=1)  # side by side
    added_KL, added_LL = _product(x_MK.T, s_MP), _product(s_MP.T, s_MP)
    if split:
        k, width = y_KL.shape
        added_KL = added_KL.view(k, 2, width).sum(1)
        added_LL = added_LL.view(2, width, 2, width).sum((0, 2))
    good = trace < limit
    y_KL += torch.where(good, added_KL, 0)
    h_LL += torch.where(good, added_LL, 0)
    return trace


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left · right in float32, of 16-bit factors."""
    return torch.mm(left, right, out_dtype=torch.float32)


def token_energy(wide_MK: Tensor) -> Tensor:
    """‖x‖² of each row, fp64 [M]."""
    # The sum along K is a cascade of about 1e-7; vector_norm adds in sequence and is 1e-6 low in
    # bf16, which would lift every certificate by as much.
    return wide_MK.square().sum(dim=1).double()


def _rounded(s_ML: Tensor, dtype: torch.dtype, split: bool) -> Tensor:
    """S as it is kept in `dtype`."""
    if dtype.itemsize >= s_ML.element_size():
        return s_ML
    high_ML, *low_ML = (plane_ML.to(s_ML.dtype) for plane_ML in _planes(s_ML, dtype, split))
    return high_ML + low_ML[0] if split else high_ML


def _planes(s_ML: Tensor, dtype: torch.dtype, split: bool) -> list[Tensor]:
    """One number of `dtype` for an entry, or two whose sum it is."""
    limits = torch.finfo(dtype)
    # Saturation keeps fp16 finite; whatever S holds, the estimate stays below xᵀ x.
    s_ML = s_ML.clamp(limits.min, limits.max)
    high_ML = s_ML.to(dtype)
    return [high_ML, (s_ML - high_ML.to(s_ML.dtype)).to(dtype)] if split else [high_ML]
