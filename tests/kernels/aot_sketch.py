"""Launches of the sketch update that must compile; see aot.py."""

import functools

import torch

from nsru_kernels.ops.sketch import energy_limit
from nsru_kernels.ops.sketch.triton import update_sketch


def call(rows, k, width, dtype, masked=False, split=False):
    make = functools.partial(torch.empty, device="meta")
    x, omega = make(rows, k, dtype=dtype), make(k, width, dtype=torch.bfloat16)
    mask = make(rows, dtype=torch.bool) if masked else None
    limit = energy_limit(torch.float32)
    update_sketch(x, omega, make(k, width), make(width, width), mask, split, limit)


# 8192 rows of 4096 are split, 14336 columns are not; narrow sketches take the one-read route.
SHAPES = ((8192, 4096, 576), (8192, 14336, 576), (8192, 4096, 184), (8192, 4096, 128))
CALLS = [
    *(functools.partial(call, *shape, torch.bfloat16) for shape in SHAPES),
    *(functools.partial(call, *shape, torch.bfloat16, masked=True) for shape in SHAPES),
    *(functools.partial(call, *shape, torch.bfloat16, split=True) for shape in SHAPES),
    *(functools.partial(call, *shape, torch.float16) for shape in SHAPES[::3]),
    *(functools.partial(call, *shape, torch.float32) for shape in SHAPES[::3]),
    functools.partial(call, 8192, 4096, 20, torch.bfloat16),
    # K that is no multiple of anything, or of 8 elements only.
    functools.partial(call, 8192, 4001, 576, torch.bfloat16, masked=True, split=True),
    functools.partial(call, 8192, 4104, 576, torch.bfloat16),
    functools.partial(call, 8192, 4001, 180, torch.bfloat16),
    functools.partial(call, 8192, 4001, 180, torch.float32),
]


def for_tokens(m):
    """Updates whose kernels must not depend on ``m``."""
    call(m, 4096, 576, torch.bfloat16, masked=True)
    call(m, 4096, 128, torch.bfloat16)
