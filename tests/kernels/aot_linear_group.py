"""Calls of the siblings' launchers whose kernels are compiled ahead of time."""

import functools

import torch

from nsru_kernels.ops.linear_group import triton


def call(m, k, ns, r, dtype):
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    ws, bs = [empty(n, k) for n in ns], [empty(n, r) for n in ns]
    a, scalings = empty(r * len(ns), k), [2.0] * len(ns)
    ys, s = triton.forward(empty(m, k), ws, a, bs, [None] * len(ns), scalings)
    needs = [True, True, *[False] * (2 * len(ns)), *[True] * len(ns)]
    triton.backward(ys, empty(m, k), ws, a, bs, s, scalings, needs)


CALLS = [
    functools.partial(call, 8192, 4096, (4096, 1024, 1024), 16, torch.bfloat16),
    functools.partial(call, 8192, 4096, (14336, 14336), 16, torch.bfloat16),
    functools.partial(call, 8192, 4096, (4096, 1024, 1024), 16, torch.float16),
    functools.partial(call, 8192, 4096, (4096, 1024, 1024), 16, torch.float32),
    functools.partial(call, 8192, 4104, (4104, 1032), 8, torch.bfloat16),
    functools.partial(call, 8191, 4001, (4003, 1001), 5, torch.bfloat16),
]


def for_tokens(m):
    """A step whose kernels must not depend on ``m``."""
    call(m, 4096, (4096, 1024, 1024), 16, torch.bfloat16)
