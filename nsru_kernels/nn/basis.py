"""The retain basis as state of a model: held once for all linears that read the same input."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RetainBasis(nn.Module):
    """U [K, Q] as a buffer.

    Sibling linears share one instance. Only the first registers it as a child, so it moves, is cast
    and is saved once.
    """

    basis: Tensor

    def __init__(self, basis: Tensor):
        super().__init__()
        check_basis(basis)
        with torch.inference_mode(False):  # autograd cannot save a tensor made in inference mode
            basis = basis.clone() if basis.is_inference() else basis.detach()
            self.register_buffer("basis", basis.contiguous())
        self.owned = False  # set by the linear that registers it

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if (loaded := state_dict.get(prefix + "basis")) is not None:
            check_basis(loaded)
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_basis(basis: Tensor) -> None:
    """Refuse a basis that no model should carry. Raises ValueError."""
    if basis.dim() != 2 or not basis.is_floating_point() or basis.shape[1] > basis.shape[0]:
        raise ValueError(
            f"basis must be a floating [K, Q] matrix with Q ≤ K, got {tuple(basis.shape)} "
            f"{basis.dtype}."
        )
    if not basis.is_meta and not torch.isfinite(basis).all():
        raise ValueError(
            f"basis {tuple(basis.shape)} holds NaN or infinite values; estimate the subspace again."
        )
