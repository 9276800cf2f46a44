"""Ā = A - (A U) C Uᵀ in eager PyTorch: the definition, on any device, up to float64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from nsru_kernels.dispatch.precision import full_float32, lowered

# A column whose squared norm is this close to one is a unit vector that storage rounded:
# bf16 moves it by at most 2^-8.
_UNIT_TOLERANCE = 2.0**-7


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which ``dtype`` adapters are projected: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def project(
    a_RK: Tensor, basis_KQ: Tensor, gram_inverse_QQ: Tensor | None, scale: float = 1.0
) -> Tensor:
    """The adapter with its component along the basis removed, times ``scale``, unrounded [R, K]."""
    if not a_RK.dtype == basis_KQ.dtype == torch.float32:
        dtype = accumulate_dtype(a_RK.dtype)
        a_RK, basis_KQ = a_RK.to(dtype), basis_KQ.to(dtype)
    if lowered(a_RK.device.type):  # TF32 would leave 1e-4 of A along the basis
        with full_float32(a_RK.device):
            return project(a_RK, basis_KQ, gram_inverse_QQ, scale)
    along_RQ = a_RK @ basis_KQ
    if gram_inverse_QQ is not None:
        along_RQ = along_RQ @ gram_inverse_QQ.to(a_RK.dtype)
    return torch.addmm(a_RK, along_RQ, basis_KQ.t(), beta=scale, alpha=-scale)


def project_many(
    as_RK: list[Tensor], bases_KQ: list[Tensor], gram_inverses_QQ: list[Tensor | None]
) -> list[Tensor]:
    """``project`` of every adapter; those in a row with one basis in one pass over it."""
    if len(as_RK) == 1:
        return [project(as_RK[0], bases_KQ[0], gram_inverses_QQ[0])]
    projected: list[Tensor] = []
    pairs = zip(as_RK, bases_KQ, strict=True)
    for _, run in itertools.groupby(pairs, key=lambda pair: (id(pair[1]), pair[0].dtype)):
        rows = [a_RK for a_RK, _ in run]
        basis_KQ, gram_inverse_QQ = bases_KQ[len(projected)], gram_inverses_QQ[len(projected)]
        if len(rows) == 1:
            projected.append(project(rows[0], basis_KQ, gram_inverse_QQ))
            continue
        stacked_RK = project(torch.cat(rows), basis_KQ, gram_inverse_QQ)
        # Copies: an op's outputs must not share storage.
        projected += [a.clone() for a in stacked_RK.split([a.shape[0] for a in rows])]
    return projected


def gram_inverse(basis_KQ: Tensor) -> Tensor:
    """C [Q, Q] with which Ũ C Ũᵀ is the intended projector, though Ũ was rounded to bf16 or fp16.

    With D the column norms of Ũ and G = (Ũ/D)ᵀ(Ũ/D), C = D⁻¹ G^-½ D² G^-½ D⁻¹. For an orthonormal
    basis D is one and C is the inverse Gram matrix; for a weighted basis U diag(√w) the weights D²
    = w stay.
    """
    basis = basis_KQ.double()
    norms = basis.norm(dim=0)
    norms = torch.where((norms.square() - 1).abs() <= _UNIT_TOLERANCE, 1.0, norms)
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    unit = basis * inverse
    eigenvalues, vectors = torch.linalg.eigh(unit.T @ unit)
    positive = eigenvalues > basis.shape[1] * torch.finfo(torch.float32).eps
    root = (vectors * torch.where(positive, eigenvalues.clamp(min=0).rsqrt(), 0.0)) @ vectors.T
    scaled = root @ (norms.square()[:, None] * root)
    return (inverse[:, None] * scaled * inverse).float()
