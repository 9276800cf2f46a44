"""The projected low-rank update of frozen linear layers, one or several that share x."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsru_kernels.checks import check_dense, check_range
from nsru_kernels.dispatch.config import requested_backend
from nsru_kernels.dispatch.launch import capturing
from nsru_kernels.ops.linear.autograd import Call, ProjectedLinear, ProjectedUpdate
from nsru_kernels.ops.linear.backends import compute_dtype
from nsru_kernels.ops.project import check_projection
from nsru_kernels.ops.project.gram import gram_inverse_of

__all__ = [
    "compute_dtype",
    "nsru_linear",
    "nsru_linear_group",
    "projected_linears",
    "projected_update",
]


def nsru_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    basis: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """y = x Wᵀ + b + s dropout(x) Āᵀ Bᵀ with Ā = A (I - U Uᵀ), the projector never formed.

    Gradients reach x, bias, lora_a, lora_b and, where it asks for one, weight. Saved tensors are
    never written to. Double backward is not supported.

    Args:
        x: [..., K] in float32, bf16 or fp16 (float64 for checks). Any strides; may be empty.
        weight: W [N, K], frozen as a rule, in x's dtype.
        lora_a: A [R, K] and
        lora_b: B [N, R], any floating dtype, float32 as a rule. Only these R-sized tensors are
            cast.
        basis: U [K, Q], the retain subspace; see ``project_adapter``. None: plain LoRA.
        bias: b [N] in x's dtype.
        scaling: s = alpha / R.
        dropout_p: probability of zeroing an element of x on its way to Ā. With p > 0 the null-space
            property holds in expectation only.
        backend: "auto", "eager", "cpu", "triton" or "cuda".

    Returns:
        y [..., N] in x's dtype. Under autocast, a float32 x (or weight) is first cast to the
        autocast dtype, as ``nn.Linear`` does.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        TypeError: one is no dense tensor, or weight is a DTensor.
        RuntimeError: dropout_p > 0 while a CUDA graph is captured.
        BackendUnavailable: a backend named explicitly cannot run here.

    Source: design after arXiv 2606.10989; the projected form is exact because x P Aᵀ = x (A P)ᵀ.

    Examples:
        >>> x, w = torch.randn(5, 32), torch.randn(16, 32)
        >>> a, b, u = torch.randn(4, 32), torch.randn(16, 4), torch.linalg.qr(torch.randn(32, 8)).Q
        >>> y = nsru_linear(x, w, a, b, u, scaling=2.0)
        >>> bool(torch.allclose(y, x @ w.T + 2 * (x - x @ u @ u.T) @ a.T @ b.T, atol=1e-4))
        True
    """
    check_dense(
        "nsru_linear", x=x, weight=weight, lora_a=lora_a, lora_b=lora_b, basis=basis, bias=bias
    )
    check_range("nsru_linear: dropout_p", dropout_p, "must be in [0, 1]")
    x, (weight,), (bias,) = _autocast(x, [weight], [bias])
    _check("nsru_linear", x, weight, lora_a, lora_b, basis, bias)
    return projected_linears(
        x, [weight], [lora_a], [lora_b], basis, [bias], None, [float(scaling)], dropout_p, backend
    )[0]


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
    projection, one S = x Āᵀ for all, one dĀ = dSᵀ x, and dX accumulated by the GEMMs. The outputs
    share one backward: to go back from some of them first, retain the graph. There is no dropout.

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
        TypeError: one is no dense tensor, or a weight is a DTensor.
        BackendUnavailable: a backend named explicitly cannot run here.

    Source: design after arXiv 2606.10989; derivation in this folder's README.

    Examples:
        >>> import torch
        >>> x, (wq, wk) = torch.randn(5, 32), (torch.randn(16, 32), torch.randn(8, 32))
        >>> a, b = torch.randn(2, 4, 32), (torch.randn(16, 4), torch.randn(8, 4))
        >>> q, k = nsru_linear_group(x, [wq, wk], list(a), b, scalings=[2.0, 2.0])
        >>> bool(torch.allclose(k, x @ wk.T + 2 * x @ a[1].T @ b[1].T, atol=1e-4))
        True
    """
    biases = [None] * len(weights) if biases is None else biases
    lists = {"lora_as": lora_as, "lora_bs": lora_bs, "biases": biases, "scalings": scalings}
    if not len(weights):
        raise ValueError("nsru_linear_group: weights must hold at least one matrix, got none.")
    for name, values in lists.items():
        if len(values) != len(weights):
            raise ValueError(
                f"nsru_linear_group: {name} must hold one entry per weight ({len(weights)}), "
                f"got {len(values)}."
            )
    for i, (weight, lora_a, lora_b, bias) in enumerate(
        zip(weights, lora_as, lora_bs, biases, strict=True)
    ):
        op = f"nsru_linear_group, index {i}"
        check_dense(op, x=x, weight=weight, lora_a=lora_a, lora_b=lora_b, basis=basis, bias=bias)
    x, weights, biases = _autocast(x, weights, biases)
    for i, (weight, lora_a, lora_b, bias) in enumerate(
        zip(weights, lora_as, lora_bs, biases, strict=True)
    ):
        _check(f"nsru_linear_group, index {i}", x, weight, lora_a, lora_b, basis, bias)
    scalings = [float(scaling) for scaling in scalings]
    return list(
        projected_linears(x, weights, lora_as, lora_bs, basis, biases, None, scalings, 0.0, backend)
    )


def projected_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    basis: Tensor | None,
    biases: Sequence[Tensor | None],
    projected: Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, ...]:
    """``nsru_linear_group`` for callers that keep the projected adapters and know what fits.

    Args:
        projected: Ā_i on top of each other, [ΣR, K] in the dtype of the computation; None where
            the op has to project.
    """
    k, dtype = weights[0].shape[-1], x.dtype
    if (
        (not x.is_meta and torch.is_autocast_enabled(x.device.type))
        or weights[0].dtype != dtype
        or x.shape[-1:] != (k,)
        or x.device != weights[0].device
    ):
        x, weights, biases = _autocast(x, weights, biases)
        for weight, a, b, bias in zip(weights, lora_as, lora_bs, biases, strict=True):
            _check("nsru_linear", x, weight, a, b, basis, bias)
    seed = _mask_seed(x.device) if dropout_p else None
    half = basis is not None and basis.element_size() < 4
    gram_inverse = gram_inverse_of(basis) if half else None
    call = Call(
        weights, biases, basis, gram_inverse, projected, scalings, dropout_p, seed,
        requested_backend(backend),
    )  # fmt: skip
    if not torch.is_grad_enabled():
        return ProjectedLinear.forward(None, call, x, *lora_as, *lora_bs)
    for tensor in (*weights, *biases):
        if tensor is not None and tensor.requires_grad:
            return ProjectedLinear.apply(call, x, *lora_as, *lora_bs, *weights, *biases)
    return ProjectedLinear.apply(call, x, *lora_as, *lora_bs)


def projected_update(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    basis: Tensor | None,
    projected: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> Tensor:
    """y + s dropout(x) Āᵀ Bᵀ [..., N] in y's dtype, for a y = x Wᵀ + b that another kernel made.

    The small products are computed in x's dtype, or autocast's; see ``projected_linears``.

    Raises: ValueError: y or x do not fit the adapter.
    """
    (n, _), (_, k) = lora_b.shape, lora_a.shape
    if x.shape[-1:] != (k,) or y.shape != (*x.shape[:-1], n):
        raise ValueError(
            f"NSRULinear: x must be [..., K={k}] and the layer's own output [..., N={n}], got "
            f"{tuple(x.shape)} and {tuple(y.shape)}."
        )
    seed = _mask_seed(x.device) if dropout_p else None
    half = basis is not None and basis.element_size() < 4
    gram_inverse = gram_inverse_of(basis) if half else None
    call = Call(
        (), (), basis, gram_inverse, projected, [scaling], dropout_p, seed,
        requested_backend(backend),
    )  # fmt: skip
    return ProjectedUpdate.apply(call, y, x, lora_a, lora_b)


def _mask_seed(device: torch.device) -> Tensor:
    """Drawn from the default generator, so that torch.manual_seed and the state that checkpointing
    saves govern it. Raises RuntimeError while a CUDA graph is captured."""
    if capturing(device):
        raise RuntimeError(
            "nsru_linear: dropout inside CUDA-graph capture would repeat one mask at every "
            "replay. Train without LoRA dropout, or call model.eval() before capturing."
        )
    return torch.randint(2**62, (), device="cpu")


def _autocast(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor | None]]:
    """All of them in autocast's dtype where it is on, as ``nn.Linear`` casts them."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x, weights, biases
    dtype = compute_dtype(x)
    if (dtype == x.dtype and not x.is_floating_point()) or x.dtype == torch.float64:
        return x, weights, biases
    casted = [bias if bias is None else bias.to(dtype) for bias in biases]
    return x.to(dtype), [weight.to(dtype) for weight in weights], casted


def _check(
    op: str,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    basis: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Refuse what no backend can compute. Raises ValueError or TypeError."""
    if type(weight).__name__ == "DTensor":
        raise TypeError(
            f"{op}: weight is a DTensor (tensor parallel?); the update would mix shards. Use "
            "FSDP2, which gathers weights before forward, or unwrap with weight.full_tensor()."
        )
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [N, K], got {tuple(weight.shape)}.")
    n, k = weight.shape
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(
            f"{op}: x must be [..., K={k}] like weight's in_features, got {tuple(x.shape)}."
        )
    if not x.is_floating_point() or x.dtype != weight.dtype:
        raise ValueError(
            f"{op}: x ({x.dtype}) and weight ({weight.dtype}) must share a floating dtype. "
            "Cast one of them, or run under torch.autocast."
        )
    if lora_a.dim() != 2 or lora_a.shape[1] != k or lora_a.shape[0] < 1:
        raise ValueError(
            f"{op}: lora_a must be [R ≥ 1, K={k}] like weight's in_features, "
            f"got {tuple(lora_a.shape)}."
        )
    check_projection(op, lora_a, basis)
    r = lora_a.shape[0]
    if tuple(lora_b.shape) != (n, r) or not lora_b.is_floating_point():
        raise ValueError(
            f"{op}: lora_b must be a floating [N={n}, R={r}] matrix, "
            f"got {tuple(lora_b.shape)} {lora_b.dtype}."
        )
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype):
        raise ValueError(
            f"{op}: bias must be [N={n}] in {x.dtype}, got {tuple(bias.shape)} {bias.dtype}."
        )
    for name, tensor in (("x", x), ("lora_a", lora_a), ("lora_b", lora_b), ("bias", bias)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, weight on {weight.device}. "
                "Move both to one device."
            )
