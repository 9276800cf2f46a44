"""Ā = A - (A U) Uᵀ on a CPU with AVX-512: float32 adapters and bases.

Adapters in a row with one basis are projected in one pass over it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsru_kernels.dispatch import cpu_extension
from nsru_kernels.dispatch.cpu_extension import Arguments


def project_many(
    as_RK: list[Tensor], bases_KQ: list[Tensor], gram_inverses_QQ: list[Tensor | None]
) -> list[Tensor]:
    """Ā_i, unrounded; see reference.py."""
    take, projected = Arguments(), [a_RK.new_empty(a_RK.shape) for a_RK in as_RK]
    adapters = [
        (take.vector(a_RK), take.vector(out_RK), a_RK.shape[0])
        for a_RK, out_RK in zip(as_RK, projected, strict=True)
    ]
    first = 0
    for i, basis_KQ in enumerate(bases_KQ, start=1):
        if i == len(bases_KQ) or bases_KQ[i] is not basis_KQ:
            rows = basis_KQ.stride(1) == 1
            basis = take.matrix(basis_KQ if rows else basis_KQ.contiguous())
            cpu_extension.load().project(basis, adapters[first:i], torch.get_num_threads())
            first = i
    return projected
