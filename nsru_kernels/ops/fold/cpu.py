"""Ā = A - (A U) Uᵀ on a CPU with AVX-512: float32 adapters and bases, the rest by reference.py.

Adapters in a row with one basis are folded in one pass over it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from nsru_kernels.ops import cpu_extension
from nsru_kernels.ops.cpu_extension import Arguments
from nsru_kernels.ops.fold import reference


def fold_many(
    as_RK: list[Tensor], bases_KQ: list[Tensor], cores_QQ: list[Tensor | None]
) -> list[Tensor]:
    """Ā_i, unrounded; see reference.py."""
    wide = {tensor.dtype for tensor in (*as_RK, *bases_KQ)} <= {torch.float32}
    if not wide or any(core_QQ is not None for core_QQ in cores_QQ):
        return reference.fold_many(as_RK, bases_KQ, cores_QQ)
    folded = [a_RK.new_empty(a_RK.shape) for a_RK in as_RK]
    triples = zip(bases_KQ, as_RK, folded, strict=True)
    for _, run in itertools.groupby(triples, key=lambda triple: id(triple[0])):
        (basis_KQ, *_), *_ = alike = list(run)
        take = Arguments()
        basis = take.matrix(basis_KQ.contiguous())
        adapters = [(take.vector(a), take.vector(out), a.shape[0]) for _, a, out in alike]
        cpu_extension.load().fold(basis, adapters, torch.get_num_threads())
    return folded
