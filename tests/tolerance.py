"""The one tolerance: no worse than twice what eager PyTorch loses at the same precision."""

import torch
from torch import Tensor

# Covers results that eager happens to hit exactly: a few roundings of numbers near one.
EPSILON = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


def assert_close_to_exact(
    got: Tensor,
    eager: Tensor,
    exact: Tensor,
    name: str = "result",
    precision: torch.dtype | None = None,
) -> None:
    """max|got - exact| ≤ 2·max|eager - exact| + ε·max|exact|, with NaN never accepted.

    Args:
        got: what the code under test computed.
        eager: the same by plain PyTorch in the same dtype.
        exact: the same in float64.
        precision: the dtype it was computed in, where the result was widened afterwards.
    """
    assert exact.dtype == torch.float64, "the reference must be float64"
    assert got.dtype == eager.dtype, f"{name}: dtype {got.dtype}, expected {eager.dtype}"
    assert got.shape == exact.shape == eager.shape, f"{name}: shape {tuple(got.shape)}"
    if not exact.numel():
        return
    error = (got.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    bound = 2 * eager_error + EPSILON[precision or got.dtype] * exact.abs().max().item()
    assert error <= bound, f"{name}: error {error:.3e}, allowed {bound:.3e}"
