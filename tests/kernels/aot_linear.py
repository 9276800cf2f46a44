"""Calls of the projected linears' launchers whose kernels are compiled ahead of time."""

import functools
import itertools

import torch

from nsru_kernels.ops.linear import triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def call(m, k, ns, r, dtype, *, bias=False, dropout_p=0.0, plan=None):
    """Both passes of linears with ``ns`` outputs each."""
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    x, a, scalings = empty(m, k), empty(r * len(ns), k), [2.0] * len(ns)
    ws, bs = [empty(n, k) for n in ns], [empty(n, r) for n in ns]
    biases = [empty(n) if bias else None for n in ns]
    seed = torch.tensor(2**40 + 1) if dropout_p else None
    ys, s = triton.forward(x, ws, a, bs, biases, scalings, dropout_p, seed, plan)
    needs = [True, True, *[False] * (2 * len(ns)), *[True] * len(ns)]
    triton.backward(ys, x, ws, a, bs, s, scalings, dropout_p, seed, needs, plan)


def both_layouts():
    """Forward reads W along K, backward along N."""
    call(8192, 4096, (4096,), 16, BF16, plan="kext")


BF16 = torch.bfloat16
MLP, ATTENTION = (14336, 14336), (4096, 1024, 1024)
CALLS = [
    # The plan that fits best, and the pointer plan, in every dtype; the shapes of a Llama layer.
    *(
        functools.partial(call, 8192, 4096, ns, 16, dtype, plan=plan)
        for ns, dtype, plan in itertools.product(((14336,), ATTENTION), DTYPES, (None, "kext"))
    ),
    functools.partial(call, 8192, 4096, MLP, 16, BF16),
    *(
        functools.partial(call, 1, 4096, ns, 16, dtype)
        for ns, dtype in itertools.product(((4096,), ATTENTION), DTYPES)
    ),
    functools.partial(call, 8192, 4096, (4096,), 16, BF16, bias=True),
    functools.partial(call, 8192, 4096, (4096,), 32, BF16, dropout_p=0.1),
    functools.partial(call, 8192, 4096, (4096,), 64, BF16, bias=True, dropout_p=0.1),
    functools.partial(call, 8192, 4096, ATTENTION, 16, BF16, bias=True, dropout_p=0.1),
    functools.partial(call, 4, 4096, (4096,), 64, BF16, bias=True),
    functools.partial(call, 4, 4096, ATTENTION, 64, BF16, bias=True),
    # Several sources with their ranks in one tile.
    functools.partial(call, 8192, 4096, (4096, 1024), 8, BF16),
    functools.partial(call, 8192, 4096, ATTENTION, 5, BF16),
    # Rows of S that start at no multiple of 16 elements.
    functools.partial(call, 4, 4096, ATTENTION, 8, BF16, bias=True),
    # Ranks below a tile, the largest that P and V of a tile are held for, and it in float32.
    functools.partial(call, 8192, 4096, (4096,), 8, BF16),
    functools.partial(call, 8192, 4096, (4096,), 64, BF16),
    functools.partial(call, 8192, 4096, (4096,), 64, torch.float32),
    # Rows of a multiple of 8 elements: TMA takes them, wide loads by pointers do not.
    functools.partial(call, 8192, 4104, (4104,), 16, BF16),
    functools.partial(call, 8192, 4104, (4104,), 16, BF16, plan="kext"),
    functools.partial(call, 8192, 4104, (4104, 1032), 8, BF16),
    # No size divisible by anything: sizes and strides that are not hinted as multiples of 16.
    functools.partial(call, 8191, 4001, (4003,), 5, BF16, bias=True),
    functools.partial(call, 8191, 4001, (4003, 1001), 5, BF16),
]


def for_tokens(m):
    """A step whose kernels must not depend on ``m``: a new batch size compiles nothing."""
    call(m, 4096, (4096,), 16, BF16, bias=True, dropout_p=0.1)
    call(m, 4096, (4096,), 16, BF16, plan="kext")
    call(m, 4096, ATTENTION, 16, BF16)
