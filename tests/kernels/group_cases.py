"""Operands of siblings, and what their results are compared with."""

import functools
import re

import torch
from tolerance import assert_close_to_exact

from nsru_kernels.ops.linear_group import reference

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


def check_both_passes(module, case, dtype):
    """Forward and backward of a backend against float64, no worse than eager."""
    args = operands(*case, dtype)
    x, ws, a, bs, _, scalings = args
    got, eager, exact = (
        module.forward(*args),
        reference.forward(*args),
        reference.forward(*wide(list(args))),
    )
    compare(*(outputs[0] for outputs in (got, eager, exact)), [f"y{i}" for i in range(len(ws))])
    compare(*([outputs[1]] for outputs in (got, eager, exact)), ["S"])
    dys, s, needs = upstream(got[0]), eager[1], [True] * (2 + 3 * len(ws))
    names = ["dx", "da", *(f"d{n}{i}" for n in ("w", "bias", "b") for i in range(len(ws)))]
    check_backward(module, (dys, x, ws, a, bs, s, scalings), needs, names)


def check_some_gradients(module, case, dtype, unused, wanted):
    """The gradients ``wanted`` of three siblings, where some outputs were not used."""
    x, ws, a, bs, biases, scalings = operands(*case, dtype)
    ys, s = reference.forward(x, ws, a, bs, biases, scalings)
    dys = [None if i in unused else dy for i, dy in enumerate(upstream(ys))]
    needs = [i in wanted for i in range(2 + 9)]
    names = ["dx", "da", *(f"d{n}{i}" for n in ("w", "bias", "b") for i in range(3))]
    check_backward(module, (dys, x, ws, a, bs, s, scalings), needs, names)


def check_backward(module, back, needs, names):
    got = module.backward(*back, needs)
    eager = reference.backward(*back, needs)
    # A backend may hand dĀ and dB out unrounded.
    unrounded = [i for i, name in enumerate(names) if re.fullmatch(r"da|db\d", name)]
    for i in unrounded:
        assert got[i].dtype in (torch.float32, eager[i].dtype), names[i]
        got[i] = got[i].to(eager[i].dtype)
    compare(got, eager, reference.backward(*wide(list(back)), needs), names)
