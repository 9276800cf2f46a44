"""update_sketch by either of the library's ways, against float64: products in the accumulators'
dtype, and products of x's own 16 bits, a GPU's default: on a CPU with a stand-in for cuBLAS's."""

from __future__ import annotations

import functools

import pytest
import torch
from tolerance import assert_close_to_exact

from nsru_kernels import ops
from nsru_kernels.dispatch import choice, choose, default_device
from nsru_kernels.dispatch.config import BACKENDS
from nsru_kernels.ops.sketch import energy_limit, reference, update_sketch
from nsru_kernels.subspaces import RetainSketch

DEVICE = default_device()
SHORT = [torch.float16, torch.bfloat16]
LIMIT = energy_limit(torch.float32)


def inputs(m, k, width, dtype=torch.float16):
    """(x, omega, y, h)."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, omega = draw(m, k).to(dtype), (draw(k, width) / k**0.5).bfloat16()
    return [tensor.to(DEVICE) for tensor in (x, omega, draw(k, width), draw(width, width))]


def wide(x, omega, y, h, mask=None, split=False, limit=LIMIT):
    return reference.update_wide(x, omega, y, h, mask, split, limit)


def short(x, omega, y, h, mask=None, split=False, limit=LIMIT):
    """The exact ‖x‖² is returned: on a CPU the norm of a row adds in sequence and is less so."""
    trace = reference.update_short(x, omega, y, h, mask, split, limit)
    kept = x.double() if mask is None else x[mask].double()
    exact = kept.square().sum()
    assert (trace < limit) == (exact < limit)
    if exact < limit:
        torch.testing.assert_close(trace, exact, rtol=1e-5, atol=0)
    return exact


BOTH = pytest.mark.parametrize("update", [wide, short])
SPLIT = pytest.mark.parametrize("split", [False, True])


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """The dtypes of the factors of each product of 16 bits."""
    seen = []

    def product(left, right):
        assert left.dtype == right.dtype
        seen.append(left.dtype)
        if left.is_cuda:
            return torch.mm(left, right, out_dtype=torch.float32)
        return left.float() @ right.float()  # no mm with out_dtype on a CPU

    monkeypatch.setattr(reference, "_product", product)
    return seen


@pytest.fixture
def no_waiting(monkeypatch):
    """The host must not ask the device for a value."""

    def ask(self):
        raise AssertionError("the host waits for the device")

    for name in ("__bool__", "item", "tolist", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, ask)


def updated(update, x, omega, y, h, mask=None, split=False):
    """(y, h, trace) after the update; the arguments stay as they are."""
    y, h = y.clone(), h.clone()
    trace = update(x, omega, y, h, mask, split=split)
    return y, h, trace


def check_update(update, x, omega, y, h, mask=None, split=False):
    """The update is its formula, 16-bit products no worse than wide ones; returns what came out."""
    got = updated(update, x, omega, y, h, mask, split)
    by_wide = updated(wide, x, omega, y, h, mask, split)
    kept = x.double() if mask is None else x[mask].double()
    s = reference._rounded(kept @ omega.to(x.dtype).double(), x.dtype, split)
    # The same S, but for entries that fp32 and fp64 products round to different neighbours.
    precision = x.dtype
    assert_close_to_exact(got[0], by_wide[0], y.double() + kept.T @ s, "y", precision)
    assert_close_to_exact(got[1], by_wide[1], h.double() + s.T @ s, "h", precision)
    torch.testing.assert_close(got[2], kept.square().sum(), rtol=1e-7, atol=0)
    return got


def check_nothing_changes(update, x, omega, y, h, mask=None, trace=None):
    """Nor do y and h where ‖x‖² is too large or no number."""
    got = updated(update, x, omega, y, h, mask)
    assert torch.equal(got[0], y)
    assert torch.equal(got[1], h)
    assert not got[2] < LIMIT if trace is None else got[2] == trace


@BOTH
@SPLIT
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("shape", [(0, 17, 20), (1, 1, 1), (63, 17, 65), (130, 200, 20)], ids=str)
def test_update_is_its_formula(shape, dtype, split, update, products):
    check_update(update, *inputs(*shape, dtype), split=split)
    expected = {dtype} if update is short else set()
    assert set(products) == expected, "nothing is widened before it is multiplied"


@BOTH
def test_products_of_exactly_representable_numbers_are_exact(update):
    x, omega, y, h = inputs(200, 96, 20)
    x, omega, y, h = x.sign(), omega.sign(), y.round(), h.round()
    got = updated(update, x, omega, y, h)
    exact = x.double()
    s = exact @ omega.double()
    assert torch.equal(got[0].double(), y.double() + exact.T @ s)
    assert torch.equal(got[1].double(), h.double() + s.T @ s)
    assert got[2] == exact.square().sum()


@BOTH
def test_masked_rows_are_not_read(update):
    x, *others = inputs(130, 40, 8)
    mask = torch.arange(130, device=DEVICE) % 3 > 0
    x[~mask] = torch.nan
    check_update(update, x, *others, mask)
    check_update(update, x, *others, mask.repeat_interleave(2)[::2])
    check_nothing_changes(update, x, *others, torch.zeros_like(mask), trace=0)


@BOTH
def test_strided_x(update):
    x, omega, y, h = inputs(80, 192, 20)
    check_update(update, x[::2, ::2], omega[::2], y[::2], h)
    check_update(update, x.T, omega.new_ones(80, 20), y.new_zeros(80, 20), h)
    check_update(update, x[:1].expand(80, 192), omega, y, h)


@BOTH
@SPLIT
def test_s_in_two_numbers_is_as_good_as_unrounded(split, update):
    x, omega, y, h = inputs(130, 96, 20)
    h.zero_()
    got = check_update(update, x, omega, y.zero_(), h, split=split)
    s = x.double() @ omega.to(x.dtype).double()
    error = (got[1].double() - s.T @ s).abs().max() / (s.T @ s).max()
    assert error < 2e-6 if split else error > 2e-5


def test_split_means_nothing_to_float32():
    arguments = inputs(63, 17, 20, torch.float32)
    for got, want in zip(
        updated(update_sketch, *arguments, split=True),
        updated(update_sketch, *arguments),
        strict=True,
    ):
        assert torch.equal(got, want)


@BOTH
@SPLIT
def test_fp16_saturates_instead_of_overflowing(split, update):
    x = torch.full((4, 32), 6e4, dtype=torch.float16, device=DEVICE)
    y, h = torch.zeros(32, 2, device=DEVICE), torch.zeros(2, 2, device=DEVICE)
    update(x, torch.ones(32, 2, device=DEVICE), y, h, split=split)
    assert y.isfinite().all()
    assert torch.equal(h, torch.full_like(h, 4 * 65504.0**2))


@BOTH
@SPLIT
@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_estimate_stays_below_the_second_moment(dtype, split, update):
    """Y H⁻¹ Yᵀ = Xᵀ P_S X: so [XᵀX Y; Yᵀ H] is positive semi-definite."""
    x, omega, y, h = inputs(200, 96, 20, dtype)
    columns = torch.arange(x.shape[1], device=DEVICE)
    x *= 2.0 ** -columns.div(8, rounding_mode="floor")
    y, h, trace = updated(update, x, omega, y.zero_(), h.zero_(), split=split)
    moment = x.double().T @ x.double()
    whole = torch.cat([torch.cat([moment, y], dim=1), torch.cat([y.T, h], dim=1).double()])
    assert torch.linalg.eigvalsh(whole).min() >= -1e-6 * trace


@BOTH
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e25])
def test_a_bad_batch_changes_nothing(bad, update):
    x, *others = inputs(20, 17, 5, torch.bfloat16)
    x[3, 4] = bad
    check_nothing_changes(update, x, *others)
    check_update(update, x, *others, torch.arange(20, device=DEVICE) != 3)


@BOTH
def test_the_limit_itself_is_refused(update):
    x, omega, y, h = inputs(4, 16, 5)
    x[:] = 1
    for limit, added in ((64.0, False), (65.0, True)):
        state = y.clone()
        assert update(x, omega, state, h.clone(), limit=limit) == 64
        assert torch.equal(state, y) != added


def test_trace_has_no_bias():
    x, omega, y, h = inputs(512, 512, 1, torch.float32)
    x += 1
    trace = updated(update_sketch, x, omega, y, h)[2]
    assert (trace.dtype, trace.shape) == (torch.float64, ())
    assert abs(trace / x.double().square().sum() - 1) < 2e-8


@pytest.mark.parametrize("masked", [False, True])
def test_the_host_waits_for_nothing(masked, no_waiting):
    x, omega, y, h = inputs(20, 17, 5)
    mask = torch.arange(20, device=DEVICE) > 3 if masked else None
    reference.update_short(x, omega, y, h, mask, False, LIMIT)


def test_a_gpu_multiplies_16_bits():
    x, _, y, _ = inputs(4, 8, 2)
    assert reference.multiplies_short(x, y) == x.is_cuda
    on_gpu = type("OnGpu", (), {"is_cuda": True, "dtype": torch.bfloat16})()
    assert reference.multiplies_short(on_gpu, y)
    assert not reference.multiplies_short(on_gpu, y.double())


@pytest.mark.parametrize("masked", [False, True])
def test_a_whole_sketch_finds_the_same_either_way(masked, monkeypatch, products):
    values = (1 / torch.arange(1, 65)).sqrt()
    x = (torch.randn(600, 64, generator=torch.Generator().manual_seed(0)) * values).half()
    mask = torch.arange(600) % 7 > 0 if masked else torch.ones(600, dtype=torch.bool)
    dirty = torch.where(mask[:, None], x, torch.nan).to(DEVICE)
    found = []
    for by_16_bits in (False, True):
        monkeypatch.setattr(reference, "multiplies_short", lambda x, y, which=by_16_bits: which)
        sketch = RetainSketch(64, 16, refresh_every=250, device=DEVICE)
        for part, keep in zip(dirty.split(150), mask.split(150), strict=True):
            sketch.update(part, keep.to(DEVICE))
        assert (sketch.tokens, sketch.refreshes) == (int(mask.sum()), int(mask.sum()) // 250)
        assert bool(products) == by_16_bits
        found.append(sketch.finalize(rank=8))
    by_wide, got = found
    assert got.trace == pytest.approx(by_wide.trace, rel=1e-5 if DEVICE.type == "cpu" else 1e-7)
    torch.testing.assert_close(got.eigenvalues, by_wide.eigenvalues, rtol=1e-4, atol=0)
    kept, basis = x[mask].double(), got.basis.double().cpu()
    captured = (kept @ basis).square().sum() / kept.square().sum()
    assert got.captured_energy <= captured + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_library_serves_under_every_name(backend, monkeypatch):
    monkeypatch.setattr(ops.sketch, "choose", choose.__wrapped__)  # no cache to be emptied
    monkeypatch.setattr(choice, "unavailable", lambda *args: None)
    arguments = inputs(63, 17, 20)
    by_name = updated(functools.partial(update_sketch, backend=backend), *arguments)
    for got, want in zip(by_name, updated(update_sketch, *arguments), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@SPLIT
@pytest.mark.parametrize("width", [128, 576])
def test_real_sizes(width, split):
    x, omega, y, h = inputs(8192, 4096, width, torch.bfloat16)
    mask = torch.arange(8192, device=DEVICE) % 50 > 0
    check_update(update_sketch, x, omega, y, h, mask, split)
    x[8000, 4000] = torch.inf
    check_nothing_changes(update_sketch, x, omega, y, h)


@pytest.mark.gpu
def test_captured_in_a_graph():
    x, omega, y, h = inputs(8192, 4096, 576, torch.bfloat16)
    want = updated(update_sketch, x, omega, y, h)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trace = update_sketch(x, omega, y, h)
    graph.replay()
    for got, expected in zip((y, h, trace), want, strict=True):
        assert torch.equal(got, expected)
