"""update_sketch in Triton against float64, by both routes; the kernels run interpreted on a CPU."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close_to_exact

from nsru_kernels import dispatch
from nsru_kernels.dispatch import BackendUnavailable
from nsru_kernels.ops import launch
from nsru_kernels.ops.sketch import energy_limit, reference, update_sketch
from nsru_kernels.subspaces import RetainSketch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
from nsru_kernels.ops.sketch import triton as sketch_triton

DEVICE = dispatch.default_device()
# Widths above ONE_READ = 184 take the route with two reads.
SHAPES = [
    (0, 17, 20),
    (1, 1, 1),
    (1, 96, 185),
    (63, 17, 65),
    (130, 96, 184),
    (130, 200, 20),
    (130, 96, 185),
    (63, 200, 200),
]
ROUTES = [pytest.param(20, id="one read"), pytest.param(185, id="two reads")]
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Whatever a launcher allocates without filling starts as NaN."""

    def poisoned(allocate):
        def allocated(*args, **options):
            tensor = allocate(*args, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return allocated

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def many_items(monkeypatch):
    """Several panels, and several chunks of every sum, although the shapes are small."""
    monkeypatch.setattr(sketch_triton, "_PANEL_BYTES", 1)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 64)
    monkeypatch.setattr(sketch_triton, "_splits", lambda tiles, rows, programs: 3)


def inputs(m, k, width, dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator).to(dtype)
    omega = (torch.randn(k, width, generator=generator) / k**0.5).bfloat16()
    y, h = (torch.randn(rows, width, generator=generator) for rows in (k, width))
    return [tensor.to(DEVICE) for tensor in (x, omega, y, h)]


def update(x, omega, y, h, mask=None, *, backend="triton", split=False):
    """(y, h, trace) after the update; the arguments stay as they are."""
    y, h = y.clone(), h.clone()
    trace = update_sketch(x, omega, y, h, mask, backend=backend, split=split)
    return y, h, trace


def assert_update_is_right(x, omega, y, h, mask=None, split=False):
    got = update(x, omega, y, h, mask, split=split)
    eager = update(x, omega, y, h, mask, backend="eager", split=split)
    kept = x.double() if mask is None else x[mask].double()
    s = reference._rounded(kept @ omega.to(x.dtype).double(), x.dtype, split)
    # The same S, but for entries that fp32 and fp64 products round to different neighbours.
    precision = x.dtype
    assert_close_to_exact(got[0], eager[0], y.double() + kept.T @ s, "y", precision)
    assert_close_to_exact(got[1], eager[1], h.double() + s.T @ s, "h", precision)
    torch.testing.assert_close(got[2], kept.square().sum(), rtol=1e-7, atol=0)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "width"), SHAPES)
def test_update_is_its_formula(m, k, width, dtype):
    assert_update_is_right(*inputs(m, k, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [20, 65, 184, 185])
def test_sums_in_many_items(width, dtype, many_items):
    assert_update_is_right(*inputs(300, 200, width, dtype))


@pytest.mark.parametrize("width", ROUTES)
def test_products_of_exactly_representable_numbers_are_exact(width, many_items):
    x, omega, y, h = inputs(200, 96, width)
    x, omega, y, h = x.sign(), omega.sign(), y.round(), h.round()
    got = update(x, omega, y, h)
    wide = x.double()
    s = wide @ omega.double()
    assert torch.equal(got[0].double(), y.double() + wide.T @ s)
    assert torch.equal(got[1].double(), h.double() + s.T @ s)
    assert got[2] == wide.square().sum()


@pytest.mark.parametrize("width", ROUTES)
def test_masked_rows_are_not_read(width, many_items):
    x, omega, y, h = inputs(130, 96, width)
    mask = torch.arange(130, device=DEVICE) % 3 > 0
    mask[64:128] = False  # a whole row block
    x[~mask] = torch.nan
    assert_update_is_right(x, omega, y, h, mask)
    nothing = torch.zeros_like(mask)
    got = update(x, omega, y, h, nothing)
    assert torch.equal(got[0], y)
    assert torch.equal(got[1], h)
    assert got[2] == 0


@pytest.mark.parametrize("width", ROUTES)
def test_strided_x(width):
    x, omega, y, h = inputs(260, 192, width)
    assert_update_is_right(x[::2, ::2], omega[::2], y[::2], h)
    assert_update_is_right(x.T, omega.new_ones(260, width), y.new_zeros(260, width), h)
    every_other = (torch.arange(260, device=DEVICE) % 3 > 0)[::2]
    assert_update_is_right(x[::2, ::2], omega[::2], y[::2], h, every_other)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("width", ROUTES)
def test_split(width, split, many_items):
    x, omega, y, h = inputs(130, 96, width)
    y.zero_()
    h.zero_()
    got = assert_update_is_right(x, omega, y, h, split=split)
    # Against products that are not rounded at all.
    s = x.double() @ omega.to(x.dtype).double()
    error = (got[1].double() - s.T @ s).abs().max() / (s.T @ s).max()
    assert error < 2e-6 if split else error > 2e-5


@pytest.mark.parametrize("width", ROUTES)
def test_split_means_nothing_to_float32(width):
    arguments = inputs(63, 17, width, torch.float32)
    for got, want in zip(update(*arguments, split=True), update(*arguments), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("width", ROUTES)
def test_saturates_fp16(width, split):
    x = torch.full((4, 32), 6e4, dtype=torch.float16, device=DEVICE)
    omega = torch.ones(32, width, device=DEVICE)
    y, h, _ = update(
        x, omega, omega.new_zeros(32, width), omega.new_zeros(width, width), split=split
    )
    assert y.isfinite().all()
    assert h.isfinite().all()
    assert h[0, 0] == 4 * 65504.0**2


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("width", ROUTES)
def test_estimate_stays_below_the_second_moment(width, split):
    """Y H⁻¹ Yᵀ = Xᵀ P_S X: so [XᵀX Y; Yᵀ H] is positive semi-definite."""
    x, omega, y, h = inputs(200, 96, width)
    x *= 2.0 ** -torch.arange(96, device=DEVICE).div(8, rounding_mode="floor")
    y, h, trace = update(x, omega, torch.zeros_like(y), torch.zeros_like(h), split=split)
    moment = x.double().T @ x.double()
    whole = torch.cat([torch.cat([moment, y], dim=1), torch.cat([y.T, h], dim=1).double()])
    assert torch.linalg.eigvalsh(whole).min() >= -1e-6 * trace


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e25])
@pytest.mark.parametrize("width", ROUTES)
@pytest.mark.parametrize("items", ["few", "many"])
def test_a_bad_batch_changes_nothing(width, bad, items, request):
    if items == "many":
        request.getfixturevalue("many_items")
    x, omega, y, h = inputs(130, 96, width, torch.float32)
    x[70, 5] = bad
    got = update(x, omega, y, h)
    assert torch.equal(got[0], y)
    assert torch.equal(got[1], h)
    assert not got[2] < energy_limit(torch.float32)


@pytest.mark.parametrize("width", ROUTES)
def test_bits_are_the_same_again(width, many_items):
    arguments = inputs(130, 96, width)
    for one, other in zip(update(*arguments), update(*arguments), strict=True):
        assert torch.equal(one, other)


def test_trace_has_no_bias():
    x, omega, y, h = inputs(512, 512, 1, torch.float32)
    x += 1
    trace = update(x, omega, y, h)[2]
    assert (trace.dtype, trace.shape) == (torch.float64, ())
    assert abs(trace / x.double().square().sum() - 1) < 2e-8


def test_fp64_is_refused():
    x, omega, y, h = inputs(4, 3, 2, torch.float64)
    with pytest.raises(BackendUnavailable, match="float64"):
        update(x, omega, y, h)
    with pytest.raises(BackendUnavailable, match="float64"):
        update(x.half(), omega, y.double(), h.double())


def test_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for choice in vars(dispatch).values():
        if hasattr(choice, "cache_clear"):
            choice.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"CUDA device.*Use backend='eager'"):
        update(*(tensor.cpu() for tensor in inputs(4, 3, 2)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [16, 185])
def test_retain_sketch_by_either_backend(width, masked, monkeypatch):
    k = 4 * width
    values = (1 / torch.arange(1, k + 1)).sqrt()
    x = (torch.randn(600, k, generator=torch.Generator().manual_seed(0)) * values).half()
    mask = torch.arange(600) % 7 > 0 if masked else torch.ones(600, dtype=torch.bool)
    dirty = torch.where(mask[:, None], x, torch.nan).to(DEVICE)
    found = {}
    for backend in ("eager", "triton"):
        monkeypatch.setenv("NSRU_BACKEND", backend)
        sketch = RetainSketch(k, width, refresh_every=250, device=DEVICE)
        for part, keep in zip(dirty.split(150), mask.split(150), strict=True):
            sketch.update(part, keep)
        assert (sketch.tokens, sketch.refreshes) == (int(mask.sum()), int(mask.sum()) // 250)
        found[backend] = sketch.finalize(rank=8)
    eager, triton = found["eager"], found["triton"]
    assert triton.trace == pytest.approx(eager.trace, rel=1e-7)
    torch.testing.assert_close(triton.eigenvalues, eager.eigenvalues, rtol=1e-4, atol=0)
    kept, basis = x[mask].double(), triton.basis.double().cpu()
    captured = (kept @ basis).square().sum() / kept.square().sum()
    assert triton.captured_energy <= captured + 1e-6


def test_retain_sketch_refuses_a_bad_batch(monkeypatch):
    monkeypatch.setenv("NSRU_BACKEND", "triton")
    sketch = RetainSketch(100, 8, device=DEVICE)
    sketch.update(torch.randn(50, 100, device=DEVICE))
    before = sketch.state_dict()
    x = torch.randn(60, 100, device=DEVICE)
    x[31, 7] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 60 .*31"):
        sketch.update(x)
    after = sketch.state_dict()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if torch.is_tensor(value) else value == after[name]
        assert same, name


@pytest.mark.gpu
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("width", [128, 184, 576])
def test_real_sizes(width, split):
    x, omega, y, h = inputs(8192, 4096, width, torch.bfloat16)
    mask = torch.arange(8192, device=DEVICE) % 50 > 0
    assert_update_is_right(x, omega, y, h, mask, split)
    first = update(x, omega, y, h, split=split)
    for _ in range(20):
        for got, want in zip(update(x, omega, y, h, split=split), first, strict=True):
            assert torch.equal(got, want)
    x[8000, 4000] = torch.inf
    got = update(x, omega, y, h, split=split)
    assert torch.equal(got[0], y)
    assert torch.equal(got[1], h)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [128, 576])
def test_captured_in_a_graph(width):
    x, omega, y, h = inputs(8192, 4096, width, torch.bfloat16)
    want = update(x, omega, y, h)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trace = update_sketch(x, omega, y, h, backend="triton")
    graph.replay()
    for got, expected in zip((y, h, trace), want, strict=True):
        assert torch.equal(got, expected)
