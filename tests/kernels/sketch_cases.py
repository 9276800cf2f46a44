"""Inputs of the sketch update, and what every kernel of it is held to.

A kernel is given as ``update(x, omega, y, h, mask, split)``: it writes y and h and returns ‖x‖².
"""

from __future__ import annotations

import functools

import pytest
import torch
from tolerance import assert_close_to_exact

from nsru_kernels.ops.sketch import energy_limit, reference, update_sketch
from nsru_kernels.subspaces import RetainSketch


def inputs(m, k, width, dtype=torch.float16, device="cpu"):
    """(x, omega, y, h)."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, omega = draw(m, k).to(dtype), (draw(k, width) / k**0.5).bfloat16()
    return [tensor.to(device) for tensor in (x, omega, draw(k, width), draw(width, width))]


def eager(x, omega, y, h, mask=None, split=False):
    return update_sketch(x, omega, y, h, mask, split=split, backend="eager")


def updated(update, x, omega, y, h, mask=None, split=False):
    """(y, h, trace) after the update; the arguments stay as they are."""
    y, h = y.clone(), h.clone()
    trace = update(x, omega, y, h, mask, split)
    return y, h, trace


def check_update(update, x, omega, y, h, mask=None, split=False):
    """The update is its formula, no worse than eager; returns what came out."""
    got = updated(update, x, omega, y, h, mask, split)
    by_eager = updated(eager, x, omega, y, h, mask, split)
    kept = x.double() if mask is None else x[mask].double()
    s = reference._rounded(kept @ omega.to(x.dtype).double(), x.dtype, split)
    # The same S, but for entries that fp32 and fp64 products round to different neighbours.
    precision = x.dtype
    assert_close_to_exact(got[0], by_eager[0], y.double() + kept.T @ s, "y", precision)
    assert_close_to_exact(got[1], by_eager[1], h.double() + s.T @ s, "h", precision)
    torch.testing.assert_close(got[2], kept.square().sum(), rtol=1e-7, atol=0)
    return got


def check_exact_products(update, x, omega, y, h):
    """Signs and whole numbers lose nothing anywhere."""
    x, omega, y, h = x.sign(), omega.sign(), y.round(), h.round()
    got = updated(update, x, omega, y, h)
    wide = x.double()
    s = wide @ omega.double()
    assert torch.equal(got[0].double(), y.double() + wide.T @ s)
    assert torch.equal(got[1].double(), h.double() + s.T @ s)
    assert got[2] == wide.square().sum()


def check_masked_rows_are_not_read(update, x, omega, y, h):
    mask = torch.arange(len(x), device=x.device) % 3 > 0
    mask[64:128] = False  # a whole row block
    x[~mask] = torch.nan
    check_update(update, x, omega, y, h, mask)
    check_nothing_changes(update, x, omega, y, h, torch.zeros_like(mask), trace=0)


def check_nothing_changes(update, x, omega, y, h, mask=None, trace=None):
    """Nor do y and h where ‖x‖² is too large or no number."""
    got = updated(update, x, omega, y, h, mask)
    assert torch.equal(got[0], y)
    assert torch.equal(got[1], h)
    assert not got[2] < energy_limit(y.dtype) if trace is None else got[2] == trace


def check_split(update, x, omega, y, h, split):
    """S in two numbers is within 2e-6 of products that are not rounded at all; in one it is not."""
    h.zero_()
    got = check_update(update, x, omega, y.zero_(), h, split=split)
    s = x.double() @ omega.to(x.dtype).double()
    error = (got[1].double() - s.T @ s).abs().max() / (s.T @ s).max()
    assert error < 2e-6 if split else error > 2e-5


def check_saturation(update, width, split, device="cpu"):
    x = torch.full((4, 32), 6e4, dtype=torch.float16, device=device)
    omega = torch.ones(32, width, device=device)
    nothing = omega.new_zeros(32, width), omega.new_zeros(width, width)
    y, h, _ = updated(update, x, omega, *nothing, split=split)
    assert y.isfinite().all()
    assert h.isfinite().all()
    assert h[0, 0] == 4 * 65504.0**2


def check_estimate_stays_below_the_second_moment(update, x, omega, y, h, split):
    """Y H⁻¹ Yᵀ = Xᵀ P_S X: so [XᵀX Y; Yᵀ H] is positive semi-definite."""
    columns = torch.arange(x.shape[1], device=x.device)
    x *= 2.0 ** -columns.div(8, rounding_mode="floor")
    nothing = torch.zeros_like(y), torch.zeros_like(h)
    y, h, trace = updated(update, x, omega, *nothing, split=split)
    moment = x.double().T @ x.double()
    whole = torch.cat([torch.cat([moment, y], dim=1), torch.cat([y.T, h], dim=1).double()])
    assert torch.linalg.eigvalsh(whole).min() >= -1e-6 * trace


def check_same_bits(update, *arguments, split=False, times=1):
    first = updated(update, *arguments, split=split)
    for _ in range(times):
        again = updated(update, *arguments, split=split)
        assert all(torch.equal(*pair) for pair in zip(again, first, strict=True))


def check_retain_sketch(backend, k, width, masked, monkeypatch, device="cpu"):
    """A whole sketch, refreshes included, finds by ``backend`` what it finds by eager."""
    values = (1 / torch.arange(1, k + 1)).sqrt()
    x = (torch.randn(600, k, generator=torch.Generator().manual_seed(0)) * values).half()
    mask = torch.arange(600) % 7 > 0 if masked else torch.ones(600, dtype=torch.bool)
    dirty = torch.where(mask[:, None], x, torch.nan).to(device)
    found = {}
    for name in ("eager", backend):
        monkeypatch.setenv("NSRU_BACKEND", name)
        sketch = RetainSketch(k, width, refresh_every=250, device=device)
        for part, keep in zip(dirty.split(150), mask.split(150), strict=True):
            sketch.update(part, keep)
        assert (sketch.tokens, sketch.refreshes) == (int(mask.sum()), int(mask.sum()) // 250)
        found[name] = sketch.finalize(rank=8)
    by_eager, got = found["eager"], found[backend]
    assert got.trace == pytest.approx(by_eager.trace, rel=1e-7)
    torch.testing.assert_close(got.eigenvalues, by_eager.eigenvalues, rtol=1e-4, atol=0)
    kept, basis = x[mask].double(), got.basis.double().cpu()
    captured = (kept @ basis).square().sum() / kept.square().sum()
    assert got.captured_energy <= captured + 1e-6
