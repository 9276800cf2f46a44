"""update_sketch in Triton against float64, by both routes; the kernels run interpreted on a CPU."""

from __future__ import annotations

import functools

import pytest
import sketch_cases
import torch

from nsru_kernels.dispatch import BackendUnavailable, choose, default_device, launch
from nsru_kernels.ops.sketch import update_sketch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
from nsru_kernels.ops.sketch import triton as sketch_triton

DEVICE = default_device()
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


inputs = functools.partial(sketch_cases.inputs, device=DEVICE)


def by_triton(x, omega, y, h, mask=None, split=False):
    return update_sketch(x, omega, y, h, mask, split=split, backend="triton")


update = functools.partial(sketch_cases.updated, by_triton)
check_update = functools.partial(sketch_cases.check_update, by_triton)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "width"), SHAPES)
def test_update_is_its_formula(m, k, width, dtype):
    check_update(*inputs(m, k, width, dtype))


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(w, DTYPES[i]) for w, i in ((20, 0), (65, 1), (184, 1), (185, 0), (185, 1))],
)
def test_sums_in_many_items(width, dtype, many_items):
    check_update(*inputs(140, 136, width, dtype))


@pytest.mark.parametrize("width", ROUTES)
def test_products_of_exactly_representable_numbers_are_exact(width, many_items):
    sketch_cases.check_exact_products(by_triton, *inputs(200, 96, width))


@pytest.mark.parametrize("width", ROUTES)
def test_masked_rows_are_not_read(width, many_items):
    sketch_cases.check_masked_rows_are_not_read(by_triton, *inputs(130, 96, width))


@pytest.mark.parametrize("width", ROUTES)
def test_strided_x(width):
    x, omega, y, h = inputs(260, 192, width)
    check_update(x[::2, ::2], omega[::2], y[::2], h)
    check_update(x.T, omega.new_ones(260, width), y.new_zeros(260, width), h)
    every_other = (torch.arange(260, device=DEVICE) % 3 > 0)[::2]
    check_update(x[::2, ::2], omega[::2], y[::2], h, every_other)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("width", ROUTES)
def test_split(width, split, many_items):
    sketch_cases.check_split(by_triton, *inputs(130, 96, width), split)


@pytest.mark.parametrize("width", ROUTES)
def test_split_means_nothing_to_float32(width):
    arguments = inputs(63, 17, width, torch.float32)
    for got, want in zip(update(*arguments, split=True), update(*arguments), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("width", ROUTES)
def test_saturates_fp16(width, split):
    sketch_cases.check_saturation(by_triton, width, split, DEVICE)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("width", ROUTES)
def test_estimate_stays_below_the_second_moment(width, split):
    sketch_cases.check_estimate_stays_below_the_second_moment(
        by_triton, *inputs(200, 96, width), split
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e25])
@pytest.mark.parametrize("width", ROUTES)
@pytest.mark.parametrize("items", ["few", "many"])
def test_a_bad_batch_changes_nothing(width, bad, items, request):
    if items == "many":
        request.getfixturevalue("many_items")
    x, omega, y, h = inputs(130, 96, width, torch.float32)
    x[70, 5] = bad
    sketch_cases.check_nothing_changes(by_triton, x, omega, y, h)


@pytest.mark.parametrize("width", ROUTES)
def test_bits_are_the_same_again(width, many_items):
    sketch_cases.check_same_bits(by_triton, *inputs(130, 96, width))


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
    choose.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"CUDA device.*Use backend='eager'"):
        update(*(tensor.cpu() for tensor in inputs(4, 3, 2)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("width", "one_read"), [(16, 184), (40, 0)], ids=["one", "two"])
def test_retain_sketch_by_either_route(width, one_read, masked, monkeypatch):
    monkeypatch.setattr(sketch_triton, "ONE_READ", one_read)
    sketch_cases.check_retain_sketch("triton", 4 * width, width, masked, monkeypatch, DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("width", [128, 184, 576])
def test_real_sizes(width, split):
    x, omega, y, h = inputs(8192, 4096, width, torch.bfloat16)
    mask = torch.arange(8192, device=DEVICE) % 50 > 0
    check_update(x, omega, y, h, mask, split)
    sketch_cases.check_same_bits(by_triton, x, omega, y, h, split=split, times=20)
    x[8000, 4000] = torch.inf
    sketch_cases.check_nothing_changes(by_triton, x, omega, y, h)


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
