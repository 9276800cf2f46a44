"""Factors of second moments, all in fp64: F [K, F] stands for the K x K matrix F Fᵀ."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS32 = torch.finfo(torch.float32).eps
_EPS64 = torch.finfo(torch.float64).eps


def nystrom_factor(y_KL: Tensor, h_LL: Tensor) -> Tensor:
    """F [K, F] with F Fᵀ = Y H⁺ Yᵀ, in fp64.

    H is brought to a unit diagonal first. fp32 accumulation then leaves about eps in every entry,
    however massive some directions are, and a symmetric matrix of such noise has eigenvalues up to
    2√L·eps: what is below is dropped. At half of that one stream of rank 5 in ten showed a sixth
    direction.
    """
    diagonal_L = h_LL.diagonal()
    scale_L = torch.where(diagonal_L > 0, diagonal_L, torch.inf).rsqrt()
    values_L, vectors_LL = torch.linalg.eigh(h_LL * scale_L * scale_L[:, None])
    keep_L = values_L > 2 * h_LL.shape[0] ** 0.5 * _EPS32
    root_LF = vectors_LL[:, keep_L] * values_L[keep_L].rsqrt()
    return y_KL @ (scale_L[:, None] * root_LF)


def rotate(factor_KF: Tensor) -> Tensor:
    """F V with V from FᵀF = V Λ Vᵀ: the same F Fᵀ, columns orthogonal and by falling norm."""
    values_F, vectors_FF = torch.linalg.eigh(factor_KF.T @ factor_KF)
    keep_F = values_F > _EPS64 * values_F.shape[0] * values_F[-1:]
    return factor_KF @ vectors_FF[:, keep_F].flip(1)


def left_singular(factor_KF: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal left singular vectors [K, F] of F and its squared singular values, falling."""
    q_KF, r_FF = torch.linalg.qr(factor_KF)
    left_FF, sigma_F, _ = torch.linalg.svd(r_FF)
    keep_F = sigma_F > _EPS64 * factor_KF.shape[0] * sigma_F[:1]
    return (q_KF @ left_FF)[:, keep_F], sigma_F[keep_F].square()


def eigen_moment(moment_KK: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors [K, Q] and eigenvalues of a second moment, falling, without the fp32 noise.

    The noise of an entry is eps·√(C_ii C_jj), that of a direction u up to 2√K·eps·Σ u_i² C_ii:
    small directions beside a massive channel stay.
    """
    values_K, vectors_KK = torch.linalg.eigh(moment_KK)
    noise_K = vectors_KK.square().T @ moment_KK.diagonal()
    keep_K = values_K > 2 * moment_KK.shape[0] ** 0.5 * _EPS32 * noise_K
    return vectors_KK[:, keep_K].flip(1), values_K[keep_K].flip(0)
