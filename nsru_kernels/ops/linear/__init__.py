"""The projected low-rank update of a frozen linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from nsru_kernels.ops.fold import check_fold
from nsru_kernels.ops.fold.core import core_of
from nsru_kernels.ops.launch import capturing
from nsru_kernels.ops.linear.autograd import ProjectedLinear

__all__ = ["nsru_linear"]


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
        TypeError: weight is a DTensor.
        RuntimeError: dropout_p > 0 while a CUDA graph is captured.
        BackendUnavailable: a backend named explicitly cannot run here.
    Source: design after arXiv 2606.10989; the folded form is exact because x P Aᵀ = x (A P)ᵀ.

    >>> x, w = torch.randn(5, 32), torch.randn(16, 32)
    >>> a, b, u = torch.randn(4, 32), torch.randn(16, 4), torch.linalg.qr(torch.randn(32, 8)).Q
    >>> y = nsru_linear(x, w, a, b, u, scaling=2.0)
    >>> bool(torch.allclose(y, x @ w.T + 2 * (x - x @ u @ u.T) @ a.T @ b.T, atol=1e-4))
    True
    """
    return projected_linear(
        x, weight, lora_a, lora_b, basis, bias, None, scaling, dropout_p, backend
    )


def projected_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    basis: Tensor | None,
    bias: Tensor | None,
    folded: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> Tensor:
    """``nsru_linear`` for callers that keep the folded adapter (modules do)."""
    x, weight, bias = autocast_inputs(x, weight, bias)
    check_linear("nsru_linear", x, weight, lora_a, lora_b, basis, bias, dropout_p)
    # Drawn from the default generator, so that torch.manual_seed and checkpointing's saved state
    # govern it.
    if dropout_p and capturing(x.device):
        raise RuntimeError(
            "nsru_linear: dropout inside CUDA-graph capture would repeat one mask at every replay. "
            "Train without LoRA dropout, or call model.eval() before capturing."
        )
    seed = torch.randint(2**62, (), device="cpu") if dropout_p else None
    if folded is not None and folded.dtype != x.dtype:
        folded = None
    return ProjectedLinear.apply(
        x, weight, bias, lora_a, lora_b, basis, core_of(basis), folded,
        float(scaling), float(dropout_p), seed, backend,
    )  # fmt: skip


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that ``nsru_linear`` computes in for this x: its own, or autocast's."""
    return x.dtype if (dtype := _autocast_dtype(x)) is None else dtype


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    if x.is_meta or not torch.is_autocast_enabled(device := x.device.type):
        return None
    if not x.is_floating_point() or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def autocast_inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All three in autocast's dtype where it is on, as ``nn.Linear`` casts them."""
    dtype = _autocast_dtype(x)
    if dtype is None:
        return x, weight, bias
    return x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)


def check_linear(
    op: str,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    basis: Tensor | None,
    bias: Tensor | None,
    dropout_p: float = 0.0,
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
    check_fold(op, lora_a, basis)
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
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1], got {dropout_p}.")
    for name, tensor in (("x", x), ("lora_a", lora_a), ("lora_b", lora_b), ("bias", bias)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, weight on {weight.device}. "
                "Move both to one device."
            )
