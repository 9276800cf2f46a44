"""Projection: Ā = A (I - U Uᵀ), the projector never formed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nsru_kernels.checks import check_dense
from nsru_kernels.dispatch.config import requested_backend
from nsru_kernels.ops.project.autograd import Projection
from nsru_kernels.ops.project.gram import gram_inverse_of

__all__ = ["check_projection", "project_adapter", "project_adapters"]


def project_adapter(lora_a: Tensor, basis: Tensor | None, *, backend: str = "auto") -> Tensor:
    """Ā = A - (A U) Uᵀ, the adapter confined to the null space of the retain subspace.

    Since x P Aᵀ = x (A P)ᵀ, projecting the adapter equals projecting the activations, at M/R times
    less work.

    Args:
        lora_a: A [R, K], any floating dtype.
        basis: U [K, Q], float32 or float64 taken as it is: orthonormal columns for a projector,
            U diag(√w) with 0 ≤ w ≤ 1 for a soft one. In bf16/fp16 the columns are no longer
            orthonormal; the inverse Gram matrix then restores an exact projector. None: no
            projection.
        backend: "auto", "eager", "cpu", "triton" or "cuda".

    Returns:
        Ā [R, K] in lora_a's dtype; computed in float32 (float64 for float64) and rounded once.
        Differentiable in lora_a.

    Raises:
        ValueError: shapes or devices do not fit, or basis requires a gradient.
        BackendUnavailable: a backend named explicitly cannot run here.

    Examples:
        >>> import torch
        >>> a, u = torch.randn(4, 32), torch.linalg.qr(torch.randn(32, 8)).Q
        >>> bool((project_adapter(a, u) @ u).abs().max() < 1e-5)
        True
    """
    return project_adapters([lora_a], [basis], backend=backend)[0]


def project_adapters(
    lora_as: Sequence[Tensor], bases: Sequence[Tensor | None], *, backend: str = "auto"
) -> list[Tensor]:
    """Project every adapter of a model: one launch where the backend has a grouped kernel.

    Args:
        lora_as: A_i [R_i, K_i], any mix of sizes and floating dtypes, all on one device.
        bases: U_i [K_i, Q_i] or None, one per adapter. The same tensor may stand for several
            adapters.
        backend: "auto", "eager", "cpu", "triton" or "cuda".

    Returns:
        Ā_i [R_i, K_i] in the dtype of A_i, in order. Differentiable in every A_i.

    Raises:
        ValueError: the lists differ in length, or a pair does not fit.
    """
    if len(lora_as) != len(bases):
        raise ValueError(
            f"project_adapters: bases must hold one entry per adapter ({len(lora_as)}), "
            f"got {len(bases)}. Use None for an adapter without a basis."
        )
    for lora_a, basis in zip(lora_as, bases, strict=True):
        check_projection("project_adapters", lora_a, basis)
    projected = list(lora_as)
    wanted = [i for i, basis in enumerate(bases) if basis is not None and lora_as[i].numel()]
    if wanted:
        outputs = Projection.apply(
            requested_backend(backend),
            [bases[i] for i in wanted],
            [gram_inverse_of(bases[i]) for i in wanted],
            *[lora_as[i] for i in wanted],
        )
        for i, output in zip(wanted, outputs, strict=True):
            projected[i] = output
    return projected


def check_projection(op: str, lora_a: Tensor, basis: Tensor | None) -> None:
    """Refuse what no backend can project. Raises ValueError or TypeError."""
    check_dense(op, lora_a=lora_a, basis=basis)
    if lora_a.dim() != 2 or not lora_a.is_floating_point():
        raise ValueError(
            f"{op}: lora_a must be a floating [R, K] matrix, got {tuple(lora_a.shape)} "
            f"{lora_a.dtype}."
        )
    if basis is None:
        return
    if basis.dim() != 2 or basis.shape[0] != lora_a.shape[1] or not basis.is_floating_point():
        raise ValueError(
            f"{op}: basis must be a floating [K={lora_a.shape[1]}, Q] matrix like in_features, "
            f"got {tuple(basis.shape)} {basis.dtype}. Was it estimated for another layer?"
        )
    if basis.shape[1] > basis.shape[0]:
        raise ValueError(
            f"{op}: basis must be [K, Q] with Q ≤ K, got {tuple(basis.shape)}. Is it transposed?"
        )
    if basis.device != lora_a.device:
        raise ValueError(
            f"{op}: basis is on {basis.device}, lora_a on {lora_a.device}. Move both to one device."
        )
    if basis.requires_grad:
        raise ValueError(f"{op}: basis is fixed and has no gradient; pass basis.detach().")
