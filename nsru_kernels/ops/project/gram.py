"""The correction of a rounded basis: computed once per basis, in eager and in compiled graphs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nsru_kernels.dispatch.choice import as_op
from nsru_kernels.ops.project.reference import gram_inverse

_library = torch.library.Library("nsru", "FRAGMENT")
_library.define("gram_inverse(Tensor basis) -> Tensor")

_known = WeakTensorKeyDictionary()  # basis → (its key then, C)


def gram_inverse_of(basis: Tensor | None) -> Tensor | None:
    """The [Q, Q] correction of a basis stored in bf16 or fp16; None where none is needed."""
    if basis is None or basis.dtype in (torch.float32, torch.float64):
        return None
    if as_op(basis):
        return torch.ops.nsru.gram_inverse(basis)
    return _current(basis)


def tensor_key(tensor: Tensor) -> tuple:
    """Identity, storage and version of a tensor, as far as PyTorch counts them."""
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device


@torch.library.impl(_library, "gram_inverse", "CompositeExplicitAutograd")
def _(basis: Tensor) -> Tensor:
    return _current(basis).clone()  # a compiled graph may write over what an op returned


@torch.library.register_fake("nsru::gram_inverse")
def _(basis):
    return basis.new_empty(basis.shape[1], basis.shape[1], dtype=torch.float32)


def _current(basis: Tensor) -> Tensor:
    key = tensor_key(basis)
    known = _known.get(basis)
    if known is None or known[0] != key:
        with torch.inference_mode(False), torch.no_grad():
            known = _known[basis] = (key, gram_inverse(basis))
    return known[1]
