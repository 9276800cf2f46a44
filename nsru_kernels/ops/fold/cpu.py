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
    if any(t.dtype != torch.float32 for t in (*as_RK, *bases_KQ)) or any(
        core_QQ is not None for core_QQ in cores_QQ
    ):
        return reference.fold_many(as_RK, bases_KQ, cores_QQ)
    folded = [torch.empty_like(a_RK, memory_format=torch.contiguous_format) for a_RK in as_RK]
    triples = zip(as_RK, folded, bases_KQ, strict=True)
    for _, run in itertools.groupby(triples, key=lambda triple: id(triple[2])):
        take, adapters = Arguments(), []
        for a_RK, folded_RK, basis_KQ in run:
            adapters.append((take.vector(a_RK), take.vector(folded_RK), a_RK.shape[0]))
        basis = take.matrix(basis_KQ.contiguous())
        cpu_extension.load().fold(basis, adapters, torch.get_num_threads())
    return folded
