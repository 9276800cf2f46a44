"""y = x Wᵀ + b + x (s Ā)ᵀ Bᵀ for few tokens, by plain products that PyTorch's autograd records.

There a call costs more in Python than in products: a Function of our own has more to do than it
saves. s Ā is a variable (``ops.project.autograd.KeptProjection``), through which gradients go.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsru_kernels.dispatch import cpu_extension
from nsru_kernels.dispatch.choice import Query, as_op, measured
from nsru_kernels.ops.linear.backends import LINEAR

# Entries of x up to which this is faster, by kind of device: on a CPU measured at K = 64, 576 and
# 2048, on a GPU not measured yet.
MOST = {"cpu": 1 << 14, "cuda": 0}
BACKENDS = ("auto", "eager")
_PLAIN = (Tensor, nn.Parameter)


def fits(x: Tensor, weight: Tensor, rank: int) -> bool:
    """True for few tokens of a linear, outside of autocast and of recorded graphs; on a CPU only
    where no kernel was measured to win."""
    if type(x) not in _PLAIN or type(weight) not in _PLAIN:
        return False
    device = x.device
    return (
        x.layout is torch.strided
        and not x.is_nested
        and 0 < x.numel() <= MOST.get(device.type, 0)
        and weight.device == device
        and x.shape[-1] == weight.shape[-1]
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled(device.type)
        and not as_op(x)
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
        and not (x.is_cpu and _has_kernels() and _kernel_wins(x, weight, rank))
    )


@functools.cache
def _has_kernels() -> bool:
    return cpu_extension.unavailable(torch.device("cpu")) is None


def _kernel_wins(x: Tensor, weight: Tensor, rank: int) -> bool:
    sizes = (x.numel() // x.shape[-1], x.shape[-1], weight.shape[0], rank)
    query, threads = Query("linear", "forward", sizes, (x.dtype,)), torch.get_num_threads()
    winner = measured(LINEAR, x.device, query, threads)
    return winner is not None and winner.backend != "eager"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, a_RK: Tensor, b_NR: Tensor) -> Tensor:
    """y [..., N] in x's dtype, in which s Ā is."""
    x_MK = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    b_RN = (b_NR if b_NR.dtype == x.dtype else b_NR.to(x.dtype)).t()
    y_MN = torch.addmm(F.linear(x_MK, weight, bias), F.linear(x_MK, a_RK), b_RN)
    return y_MN if x.dim() == 2 else y_MN.view(*x.shape[:-1], -1)
