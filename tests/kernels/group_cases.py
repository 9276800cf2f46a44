"""Operands of siblings, and what their results are compared with."""

import functools

import torch
from tolerance import assert_close_to_exact

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALINGS = [1.7, 0.5, 3.0, 0.9]


def operands(m, k, ns, ranks, dtype, biased=True):
    """Arguments of ``forward``."""
    g = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=g)
    place = functools.partial(torch.Tensor.to, device=DEVICE, dtype=dtype)
    ws = [place(draw(n, k) / k**0.5) for n in ns]
    bs = [place(draw(n, r)) for n, r in zip(ns, ranks, strict=True)]
    biases = [place(draw(n)) if biased and i != 1 else None for i, n in enumerate(ns)]
    a = place(draw(sum(ranks), k) / k**0.5)
    return place(draw(m, k)), ws, a, bs, biases, SCALINGS[: len(ns)]


def wide(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    return [wide(v) for v in value] if isinstance(value, list) else value


def upstream(ys):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(y.shape, generator=g).to(y) for y in ys]


def compare(got, eager, exact, names):
    for name, *values in zip(names, got, eager, exact, strict=True):
        if values[2].numel():
            assert_close_to_exact(*values, name)
        else:
            assert not values[0].numel(), f"{name} was not asked for"
