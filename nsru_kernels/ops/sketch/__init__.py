"""update_sketch: add a batch of activations to the state of a streaming retain subspace."""

from __future__ import annotations

import torch
from torch import Tensor

from nsru_kernels.dispatch.choice import Op, Query, choose
from nsru_kernels.dispatch.config import requested_backend
from nsru_kernels.ops.sketch import reference

__all__ = ["QUERY", "SKETCH", "energy_limit", "update_sketch"]

# Library GEMMs under every name.
SKETCH = Op(
    name="sketch",
    callers={"sketch": "RetainSketch.update"},
    load=lambda backend: reference,
    dtypes={},
    kernels={},
)
QUERY = Query("sketch", "update_sketch")
# 256 batches, times 4 for an omega that makes S larger than x.
_HEADROOM = 256 * 4


def update_sketch(
    x: Tensor,
    omega: Tensor,
    y: Tensor,
    h: Tensor,
    mask: Tensor | None = None,
    *,
    split: bool = False,
    backend: str = "auto",
) -> Tensor:
    """S = round(x omega);  y += xᵀ S;  h += Sᵀ S;  returns ‖x‖², over the rows that `mask` keeps.

    S is rounded to x's dtype before both products, so y h⁻¹ yᵀ is xᵀ P_S x with an exact projector
    P_S: positive semi-definite, and never above xᵀ x, whatever the rounding.

    Where ‖x‖² is not below ``energy_limit`` of the accumulators (NaN and infinite included), y and
    h stay exactly as they were. For 16-bit x on a GPU the device decides that; everywhere else the
    host waits for it once.

    Args:
        x: activations [M, K], any floating dtype.
        omega: test matrix [K, L], any floating dtype; read rounded to x's dtype.
        y: accumulator [K, L], fp32 or fp64, contiguous; written in place.
        h: accumulator [L, L] of y's dtype, contiguous; written in place.
        mask: bool [M], True keeps the row. A row left out may hold anything, NaN included.
        split: keep S of a 16-bit x as the sum of two 16-bit numbers, round(x omega) and the rounded
            rest: as good as 16 bits of mantissa in bf16, for about twice the products. No effect on
            other dtypes.
        backend: "auto", "eager", "cpu", "triton" or "cuda": library GEMMs serve under every name
            that can serve on x's device.

    Returns: ‖x‖² over the kept rows, fp64 [] on x's device, to about 1e-7.

    Raises:
        TypeError: x is not floating, the mask not bool, or an accumulator not fp32/fp64.
        ValueError: shapes, devices or strides do not fit.
        BackendUnavailable: the named backend cannot serve here.

    Source: Tropp, Yurtsever, Udell, Cevher, "Fixed-rank approximation of a positive-semidefinite
        matrix from streaming data", 2017 (one pass, fixed test matrix).

    Examples:
        >>> x = torch.eye(4)
        >>> y, h = torch.zeros(4, 2), torch.zeros(2, 2)
        >>> update_sketch(x, torch.eye(4, 2), y, h)
        tensor(4., dtype=torch.float64)
        >>> torch.equal(h, torch.eye(2))
        True
    """
    _check(x, omega, y, h, mask)
    split = split and x.dtype.itemsize == 2
    module = choose(SKETCH, requested_backend(backend), x.device, *QUERY, threads=1).module
    return module.update_sketch(x, omega, y, h, mask, split, energy_limit(y.dtype))


def energy_limit(accumulator: torch.dtype) -> float:
    """A batch is added where its ‖x‖² is below this: 256 such batches overflow no accumulator."""
    return torch.finfo(accumulator).max / _HEADROOM


def _check(x: Tensor, omega: Tensor, y: Tensor, h: Tensor, mask: Tensor | None) -> None:
    if not x.is_floating_point() or not omega.is_floating_point():
        raise TypeError(
            f"update_sketch: x and omega must be floating, got {x.dtype} and {omega.dtype}."
        )
    if x.ndim != 2:
        raise ValueError(
            f"update_sketch: x must be [M, K], got {tuple(x.shape)}; flatten its tokens first."
        )
    rows, k = x.shape
    if omega.ndim != 2 or omega.shape[0] != k:
        raise ValueError(
            f"update_sketch: omega must be [K={k}, L] like x's features, got {tuple(omega.shape)}."
        )
    width = omega.shape[1]
    if width < 1:
        raise ValueError(f"update_sketch: omega must have columns, got {tuple(omega.shape)}.")
    for name, accumulator, shape in (("y", y, (k, width)), ("h", h, (width, width))):
        if accumulator.shape != shape:
            raise ValueError(
                f"update_sketch: {name} must be {list(shape)}, got {tuple(accumulator.shape)}."
            )
        if accumulator.dtype not in (torch.float32, torch.float64) or accumulator.dtype != y.dtype:
            raise TypeError(
                f"update_sketch: y and h must both be fp32 or both fp64, got {y.dtype}, {h.dtype}."
            )
        if not accumulator.is_contiguous() or accumulator.is_neg():
            raise ValueError(
                f"update_sketch: {name} is written in place and must be contiguous, no lazy view."
            )
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"update_sketch: mask must be bool, got {mask.dtype}; use mask.bool().")
        if mask.shape != (rows,):
            raise ValueError(f"update_sketch: mask must be [M={rows}], got {tuple(mask.shape)}.")
    devices = {t.device for t in (x, omega, y, h, mask) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"update_sketch: tensors are on {sorted(map(str, devices))}; move to one.")
