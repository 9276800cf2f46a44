"""The retain basis as state of a model: held once for all linears that read the same input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsru_kernels.ops.fold import core_of


class RetainBasis(nn.Module):
    """U [K, Q] as a buffer, with the correction that a bf16/fp16 copy of it needs.

    Sibling linears share one instance. Only the first registers it as a child, so it moves, is cast and is
    saved once.
    """

    def __init__(self, basis: Tensor):
        super().__init__()
        check_basis(basis)
        self.register_buffer("basis", basis.detach().contiguous())
        self.owned = False  # set by the linear that registers it
        self._core: tuple[tuple, Tensor | None] | None = None

    def key(self) -> tuple:
        """Changes whenever the basis does: moved, cast, loaded or edited in place."""
        return tensor_key(self.basis)

    def core(self) -> Tensor | None:
        """``core_of(basis)``, computed anew only after the basis changed."""
        if torch.compiler.is_compiling():
            return core_of(self.basis)
        key = self.key()
        if self._core is None or self._core[0] != key:
            self._core = (key, core_of(self.basis))
        return self._core[1]

    def __getstate__(self):
        return {**super().__getstate__(), "_core": None}

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if (loaded := state_dict.get(prefix + "basis")) is not None:
            check_basis(loaded)
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_basis(basis: Tensor) -> None:
    """Refuse a basis that no model should carry. Raises ValueError."""
    if basis.dim() != 2 or not basis.is_floating_point() or basis.shape[1] > basis.shape[0]:
        raise ValueError(
            f"basis must be a floating [K, Q] matrix with Q ≤ K, got {tuple(basis.shape)} {basis.dtype}."
        )
    if not torch.isfinite(basis).all():
        raise ValueError(
            f"basis {tuple(basis.shape)} holds NaN or infinite values; estimate the subspace again."
        )


def tensor_key(tensor: Tensor) -> tuple:
    """Identity, storage and version of a tensor, as far as PyTorch counts them."""
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device
