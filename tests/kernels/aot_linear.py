"""Calls of the projected linear's launchers whose kernels are compiled ahead of time."""

import functools
import itertools

import torch

from nsru_kernels.ops.linear import triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def call(m, k, n, r, dtype, *, bias=False, dropout_p=0.0, plan=None):
    empty = functools.partial(_empty, dtype=dtype)
    x, w, a, b = empty(m, k), empty(n, k), empty(r, k), empty(n, r)
    bias = empty(n) if bias else None
    seed = torch.tensor(2**40 + 1) if dropout_p else None
    y, s = triton.forward(x, w, a, b, bias, 2.0, dropout_p, seed, plan)
    needs = [True, False, False, True, True]
    triton.backward(y, x, w, a, b, s, 2.0, dropout_p, seed, needs)


CALLS = [
    # The plan that fits best, and the pointer plan, in every dtype; the shapes of a Llama layer.
    *(
        functools.partial(call, 8192, 4096, 14336, 16, dtype, plan=plan)
        for dtype, plan in itertools.product(DTYPES, (None, "kext"))
    ),
    *(functools.partial(call, 1, 4096, 4096, 16, dtype) for dtype in DTYPES),
    functools.partial(call, 8192, 4096, 4096, 16, torch.bfloat16, bias=True),
    functools.partial(call, 8192, 4096, 4096, 32, torch.bfloat16, dropout_p=0.1),
    functools.partial(call, 8192, 4096, 4096, 64, torch.bfloat16, bias=True, dropout_p=0.1),
    functools.partial(call, 4, 4096, 4096, 64, torch.bfloat16, bias=True),
    # Ranks below a tile, and the largest in float32.
    functools.partial(call, 8192, 4096, 4096, 8, torch.bfloat16),
    functools.partial(call, 8192, 4096, 4096, 64, torch.float32),
    # Rows of a multiple of 8 elements: TMA takes them, wide loads by pointers do not.
    functools.partial(call, 8192, 4104, 4104, 16, torch.bfloat16),
    functools.partial(call, 8192, 4104, 4104, 16, torch.bfloat16, plan="kext"),
    # No size divisible by anything: sizes and strides that are not hinted as multiples of 16.
    functools.partial(call, 8191, 4001, 4003, 5, torch.bfloat16, bias=True),
]


def for_tokens(m):
    """A step whose kernels must not depend on ``m``: a new batch size compiles nothing."""
    call(m, 4096, 4096, 16, torch.bfloat16, bias=True, dropout_p=0.1)
    call(m, 4096, 4096, 16, torch.bfloat16, plan="kext")
