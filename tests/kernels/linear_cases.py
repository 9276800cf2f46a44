"""Inputs for the projected linear, and what it is compared with."""

import functools

import torch
import torch.nn.functional as F
from tolerance import assert_close_to_exact

import nsru_kernels as nk

GRADIENTS = ("x", "weight", "bias", "lora_a", "lora_b")


def make_inputs(m=7, k=24, n=20, r=4, q=6, *, dtype=torch.float32, adapter=None, seed=0):
    """({x, weight, bias, lora_a, lora_b}, orthonormal basis or None); ``m`` may be a shape."""
    draw = functools.partial(
        torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lead = (m,) if isinstance(m, int) else m
    inputs = {
        "x": draw(*lead, k).to(dtype),
        "weight": (draw(n, k) / k**0.5).to(dtype),
        "bias": draw(n).to(dtype),
        "lora_a": (draw(r, k) / k**0.5).to(adapter or wide),
        "lora_b": draw(n, r).to(adapter or wide),
    }
    return inputs, make_basis(k, q, seed).to(wide) if q else None


def make_basis(k, q, seed=0):
    """[K, Q] with orthonormal columns, float64."""
    g = torch.Generator().manual_seed(seed + 1)
    return torch.linalg.qr(torch.randn(k, q, generator=g, dtype=torch.float64)).Q.contiguous()


def activation_projection(x, weight, lora_a, lora_b, bias=None, *, basis=None, scaling=1.0):
    """What the op replaces: x projected token by token in its own dtype, then plain LoRA."""
    projected = x if basis is None else x - (x @ basis.to(x.dtype)) @ basis.to(x.dtype).T
    update = F.linear(F.linear(projected, lora_a.to(x.dtype)), lora_b.to(x.dtype))
    return F.linear(x, weight, bias) + scaling * update


def run(function, inputs, wanted=GRADIENTS, dy=None):
    """(y, {name: gradient}) with leaves of which only ``wanted`` require one."""
    leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in inputs.items()}
    y = function(**leaves)
    if dy is None:
        g = torch.Generator().manual_seed(9)
        dy = torch.randn(y.shape, generator=g, dtype=torch.float64)
    grads = torch.autograd.grad(y, [leaves[n] for n in wanted], dy.to(y))
    return y.detach(), dict(zip(wanted, grads, strict=True))


def check_against_exact(inputs, basis, *, wanted=GRADIENTS, dy=None, function=nk.nsru_linear):
    """y and the wanted gradients: as good as activation projection in the same dtype."""
    settings = {"basis": basis, "scaling": 1.7}
    exact_settings = {**settings, "basis": None if basis is None else basis.double()}
    exact_inputs = {n: t.double() for n, t in inputs.items()}
    got = run(functools.partial(function, **settings), inputs, wanted, dy)
    eager = run(functools.partial(activation_projection, **settings), inputs, wanted, dy)
    exact = run(
        functools.partial(activation_projection, **exact_settings), exact_inputs, wanted, dy
    )
    assert_close_to_exact(got[0], eager[0], exact[0], "y")
    for name in wanted:
        grads = (got[1][name], eager[1][name], exact[1][name])
        assert_close_to_exact(*grads, f"d{name}", precision=inputs["x"].dtype)
