"""Projected linears that read the same x, taken together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nsru_kernels.ops.fold.core import core_of
from nsru_kernels.ops.linear import autocast_inputs, check_linear
from nsru_kernels.ops.linear_group.autograd import ProjectedLinearGroup

__all__ = ["nsru_linear_group"]


def nsru_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    basis: Tensor | None = None,
    biases: Sequence[Tensor | None] | None = None,
    *,
    scalings: Sequence[float],
    backend: str = "auto",
) -> list[Tensor]:
    """y_i = x W_iᵀ + b_i + s_i x Ā_iᵀ B_iᵀ with Ā_i = A_i (I - U Uᵀ), for linears that share x.

    The same values and gradients as one ``nsru_linear`` each, in fewer passes over x and dX: one
    fold, one S = x Āᵀ for all, one dĀ = dSᵀ x, and dX accumulated by the GEMMs. The outputs share
    one backward: to go back from some of them first, retain the graph. There is no dropout.

    Args:
        x: [..., K] in float32, bf16 or fp16 (float64 for checks). Any strides; may be empty.
        weights: W_i [N_i, K], frozen as a rule, in x's dtype.
        lora_as: A_i [R_i, K] and
        lora_bs: B_i [N_i, R_i], any floating dtypes, float32 as a rule. Only R-sized tensors are
            cast.
        basis: U [K, Q], the one retain subspace of their input; see ``project_adapter``. None:
            plain LoRA.
        biases: b_i [N_i] in x's dtype or None, one for each. None: no bias anywhere.
        scalings: s_i = alpha_i / R_i.
        backend: "auto", "eager", "cpu", "triton" or "cuda".
    Returns:
        y_i [..., N_i] in x's dtype, in order; under autocast as ``nsru_linear``.
    Raises:
        ValueError: the lists are empty or differ in length, or shapes, dtypes or devices do not
            fit; the message names the index.
        TypeError: a weight is a DTensor.
        BackendUnavailable: a backend named explicitly cannot run here.
    Source: design after arXiv 2606.10989; derivation in this folder's README.

    >>> import torch
    >>> x, (wq, wk) = torch.randn(5, 32), (torch.randn(16, 32), torch.randn(8, 32))
    >>> a, b = torch.randn(2, 4, 32), (torch.randn(16, 4), torch.randn(8, 4))
    >>> q, k = nsru_linear_group(x, [wq, wk], list(a), b, scalings=[2.0, 2.0])
    >>> bool(torch.allclose(k, x @ wk.T + 2 * x @ a[1].T @ b[1].T, atol=1e-4))
    True
    """
    if biases is None:
        biases = [None] * len(weights)
    lists = {"lora_as": lora_as, "lora_bs": lora_bs, "biases": biases, "scalings": scalings}
    if not len(weights):
        raise ValueError("nsru_linear_group: weights must hold at least one matrix, got none.")
    for name, values in lists.items():
        if len(values) != len(weights):
            raise ValueError(
                f"nsru_linear_group: {name} must hold one entry per weight ({len(weights)}), "
                f"got {len(values)}."
            )
    return projected_linear_group(
        x, weights, lora_as, lora_bs, basis, biases, None, scalings, backend
    )


def projected_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    basis: Tensor | None,
    biases: Sequence[Tensor | None],
    folded: Tensor | None,
    scalings: Sequence[float],
    backend: str,
) -> list[Tensor]:
    """``nsru_linear_group`` for callers that keep the stacked folded adapters (modules do)."""
    cast_weights, cast_biases = [], []
    for i, (weight, lora_a, lora_b, bias) in enumerate(
        zip(weights, lora_as, lora_bs, biases, strict=True)
    ):
        x, weight, bias = autocast_inputs(x, weight, bias)
        check_linear(f"nsru_linear_group, index {i}", x, weight, lora_a, lora_b, basis, bias)
        cast_weights.append(weight)
        cast_biases.append(bias)
    if folded is not None and folded.dtype != x.dtype:
        folded = None
    return list(
        ProjectedLinearGroup.apply(
            x, basis, core_of(basis), folded, [float(s) for s in scalings], backend,
            *cast_weights, *cast_biases, *lora_as, *lora_bs,
        )
    )  # fmt: skip
