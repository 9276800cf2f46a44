"""The CUDA backend of the sketch update against float64.

Without a GPU its kernel runs emulated, thread by thread. Tests marked ``gpu`` run it at real sizes:
`pytest -m gpu -x tests/kernels/test_sketch_cuda.py`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import pytest
import sketch_cases
import torch
from sketch_cases import check_update, inputs, updated

import nsru_kernels as nk
from nsru_kernels.dispatch import extension
from nsru_kernels.ops.sketch import cuda, energy_limit, update_sketch

DTYPES = [torch.bfloat16, torch.float16]
GPU = torch.device("cuda")
LIMIT = energy_limit(torch.float32)
# Below, at and beyond a column tile of 32 to 192, with and without padding to 16 bytes.
WIDTHS = [1, 7, 16, 63, 96, 130, 184, 200]
SHAPES = [(1, 8, 1), (63, 72, 7), (65, 264, 63), (200, 72, 130), (130, 200, 184), (1, 136, 200)]
REAL = [(8192, 4096, 128), (8192, 14336, 64), (8191, 4096, 184), (4096, 4096, 576)]


def by_cuda(x, omega, y, h, mask=None, split=False):
    return cuda.update_sketch(x, omega, y, h, mask, split, LIMIT)


# ---------------------------------------------------------------- without a GPU


@pytest.fixture
def kernel(emulated, monkeypatch):
    """The emulated extension, with a workspace of ones: NaN in every format, no counter zero."""
    allocate = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        fresh = allocate(self, *args, **kwargs)
        return fresh.fill_(255) if fresh.dtype == torch.uint8 else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    return emulated


@pytest.fixture
def many_panels(monkeypatch):
    """A panel for every 64 rows; then chunks of all sums fill the emulated multiprocessors."""
    monkeypatch.setattr(cuda, "_PANEL_BYTES", 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update_is_its_formula(kernel, shape, dtype):
    check_update(by_cuda, *inputs(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_products_of_exactly_representable_numbers_are_exact(kernel, many_panels, width, dtype):
    sketch_cases.check_exact_products(by_cuda, *inputs(150, 136, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_in_many_items(kernel, many_panels, dtype):
    check_update(by_cuda, *inputs(300, 200, 20, dtype))
    check_update(by_cuda, *inputs(300, 520, 65, dtype))


@pytest.mark.parametrize("width", [20, 184])
def test_masked_rows_are_not_read(kernel, many_panels, width):
    sketch_cases.check_masked_rows_are_not_read(by_cuda, *inputs(130, 96, width))
    mask = (torch.arange(260) % 3 > 0)[::2]
    check_update(by_cuda, *inputs(130, 96, width, torch.bfloat16), mask)


def test_an_empty_batch_changes_nothing(kernel):
    sketch_cases.check_nothing_changes(by_cuda, *inputs(0, 16, 5), trace=0)


def test_strided_x(kernel):
    x, omega, y, h = inputs(80, 192, 20)
    check_update(by_cuda, x[::2, ::2], omega[::2], y[::2], h)
    check_update(by_cuda, x.T, omega.new_ones(80, 20), y.new_zeros(80, 20), h)
    shifted = torch.randn(80, 193).half()[:, 1:]
    check_update(by_cuda, shifted, omega, y, h)
    check_update(by_cuda, x[:1].expand(80, 192), omega, y, h)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("width", [20, 130])
def test_split(kernel, many_panels, width, split):
    sketch_cases.check_split(by_cuda, *inputs(130, 96, width), split)
    sketch_cases.check_split(by_cuda, *inputs(130, 96, width), split)


@pytest.mark.parametrize("split", [False, True])
def test_saturates_fp16(kernel, split):
    sketch_cases.check_saturation(by_cuda, 20, split)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_estimate_stays_below_the_second_moment(kernel, many_panels, dtype, split):
    arguments = inputs(200, 96, 20, dtype)
    sketch_cases.check_estimate_stays_below_the_second_moment(by_cuda, *arguments, split)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e25])
@pytest.mark.parametrize("width", [20, 184])
def test_a_bad_batch_changes_nothing(kernel, many_panels, width, bad):
    x, omega, y, h = inputs(130, 96, width, torch.bfloat16)
    x[70, 5] = bad
    sketch_cases.check_nothing_changes(by_cuda, x, omega, y, h)
    mask = torch.ones(130, dtype=torch.bool)
    mask[70] = False
    check_update(by_cuda, x, omega, y, h, mask)


def test_the_limit_itself_is_refused(kernel):
    x, omega, y, h = inputs(4, 16, 5)
    x[:] = 1
    for limit, added in ((64.0, False), (65.0, True)):
        state = y.clone()
        assert cuda.update_sketch(x, omega, state, h.clone(), None, False, limit) == 64
        assert torch.equal(state, y) != added


@pytest.mark.parametrize("split", [False, True])
def test_bits_are_the_same_again(kernel, many_panels, split):
    sketch_cases.check_same_bits(by_cuda, *inputs(130, 136, 65), split=split)


def test_batches_add_up(kernel):
    x, omega, y, h = inputs(190, 96, 20, torch.bfloat16)
    got, expected = (y.clone(), h.clone()), (y.clone(), h.clone())
    for part in x.split(70):
        by_cuda(part, omega, *got)
        sketch_cases.eager(part, omega, *expected)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3 * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_trace_has_no_bias(kernel, dtype):
    x, omega, y, h = inputs(512, 512, 1, dtype)
    x += 1
    trace = updated(by_cuda, x, omega, y, h)[2]
    assert (trace.dtype, trace.shape) == (torch.float64, ())
    assert abs(trace / x.double().square().sum() - 1) < 2e-8


@pytest.mark.parametrize("split", [False, True])
def test_nothing_beyond_the_operands_is_read_or_written(kernel, split):
    m, k, width = 70, 72, 13
    x, omega, y, h = inputs(m, k, width)
    around = torch.full((m + 2, k + 16), torch.nan, dtype=x.dtype)
    inside = around[1:-1, 8:-8]
    inside.copy_(x)
    omega_around = torch.full((k, 24), torch.nan, dtype=torch.float16)
    omega_around[:, :width] = omega
    marks = [torch.full((t.numel() + 2,), 7.0) for t in (y, h)]
    states = [mark[1:-1].view(t.shape).copy_(t) for mark, t in zip(marks, (y, h), strict=True)]
    trace = torch.full((3,), 7.0, dtype=torch.float64)
    call = call_of(inside, omega_around, *states, trace[1:], split=split)
    kernel.launch_sketch_update(**call, allocate=Memory())
    expected = updated(by_cuda, x, omega, y, h, split=split)
    for got, want in zip((*states, trace[1]), expected, strict=True):
        assert torch.equal(got, want)
    for mark in (*marks, trace):
        assert mark[0] == mark[-1] == 7


@pytest.mark.skipif(sys.platform != "linux", reason="guards a page, runs in a fork")
@pytest.mark.parametrize("split", [False, True])
def test_nothing_beyond_the_last_byte_is_touched(kernel, split):
    # Neither sum is in chunks, so that S ends the workspace; no size fills its last tile.
    m, k, width = 330, 648, 13
    x, omega, y, h = inputs(m, k, width)
    omega = torch.nn.functional.pad(omega.half(), (0, 3))
    trace = torch.zeros(1, dtype=torch.float64)
    x, omega, y, h, trace = (before_guard(tensor) for tensor in (x, omega, y, h, trace))
    call = call_of(x, omega, y, h, trace, split=split)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            kernel.launch_sketch_update(**call, allocate=Memory(before_guard))
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def before_guard(tensor):
    """A copy whose last byte ends a page, before one that nobody may touch."""
    size = tensor.numel() * tensor.itemsize
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    guard = ctypes.c_void_p(address + pages * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    start = pages * mmap.PAGESIZE - size
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return copy.view(tensor.shape).copy_(tensor)


def call_of(x, omega, y, h, trace, split=False):
    """What cuda.py hands to the launcher."""
    (m, k), width = x.shape, y.shape[1]
    pointers = {"x": x, "omega": omega, "y": y, "h": h, "trace": trace}
    sizes = {"m": m, "k": k, "l": width, "ldx": x.stride(0), "ldomega": omega.stride(0)}
    options = {"mask": 0, "split": split, "limit": LIMIT, "panel_bytes": 1 << 20, "dtype": "fp16"}
    addresses = {name: tensor.data_ptr() for name, tensor in pointers.items()}
    return {**addresses, **sizes, **options, "device": 0, "stream": 0}


class Memory:
    """Allocates workspaces of ones and keeps them; ``place`` moves them to where they shall lie."""

    def __init__(self, place=lambda tensor: tensor):
        self.place, self.kept = place, []

    def __call__(self, size):
        self.kept.append(self.place(torch.full((size,), 255, dtype=torch.uint8)))
        return self.kept[-1].data_ptr()


def test_the_launcher_names_the_argument_that_it_cannot_take(kernel):
    x, omega, y, h = inputs(9, 64, 16)
    omega = omega.half()
    trace = torch.zeros((), dtype=torch.float64)
    call = call_of(x, omega, y, h, trace)
    for change, message in (
        ({"k": 60}, "k=60 must be a multiple of 8"),
        ({"m": 0}, "m=0 must be between 1"),
        ({"l": -1}, "l=-1 must be between 1"),
        ({"ldx": 56}, "ldx=56 is less than the 64 columns of x"),
        ({"ldx": 65}, "ldx=65: rows of x must start at multiples of 16 bytes"),
        ({"ldomega": 8}, "ldomega=8 is less than the 16 columns of omega"),
        ({"x": call["x"] + 2}, f"x must start at .* got address {call['x'] + 2}"),
        *(({name: 0}, f"{name} is a null pointer") for name in ("omega", "y", "h", "trace")),
        ({"trace": call["trace"] + 4}, "trace must start at a multiple of 8 bytes"),
        ({"y": call["y"] + 2}, "y must start at a multiple of 4 bytes"),
        ({"panel_bytes": -1}, "panel_bytes=-1 must be positive"),
        (dict.fromkeys(("m", "k", "l", "ldx", "ldomega"), 2**30), "make more than .* work items"),
        ({"dtype": "fp32"}, "dtype must be bf16 or fp16"),
        ({"dtype": "fp8"}, "got 'fp8'"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel.launch_sketch_update(**call | change, allocate=pytest.fail)
    for memory, message in (
        (Memory(lambda tensor: tensor[8:]), "workspace must start at a multiple of 16 bytes"),
        (lambda size: 0, "workspace is a null pointer"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel.launch_sketch_update(**call, allocate=memory)


def test_what_the_allocator_raises_reaches_the_caller(kernel):
    x, omega, y, h = inputs(9, 64, 16)

    def out_of_memory(size):
        raise torch.OutOfMemoryError(f"{size} bytes")

    call = call_of(x, omega.half(), y, h, torch.zeros((), dtype=torch.float64))
    with pytest.raises(torch.OutOfMemoryError, match=r"^\d+ bytes$"):
        kernel.launch_sketch_update(**call, allocate=out_of_memory)


def test_refusals_name_the_reason_and_the_other_backend():
    x, omega, y, h = inputs(9, 64, 5)
    for arguments, message in (
        ((x.float(), omega, y, h), "bf16 and fp16, got torch.float32. Use 'triton'"),
        ((x.double(), omega, y, h), "bf16 and fp16, got torch.float64. Use 'eager'"),
        ((x, omega, y.double(), h.double()), "y and h are torch.float64. Use 'eager'"),
        ((x[:, :63], omega[:63], y[:63], h), r"multiple of 8, got \(9, 63\). Use 'triton'"),
    ):
        with pytest.raises(nk.BackendUnavailable, match=message):
            by_cuda(*arguments)


@pytest.mark.parametrize("masked", [False, True])
def test_retain_sketch(kernel, serves_the_cpu, monkeypatch, masked):
    sketch_cases.check_retain_sketch("cuda", 64, 16, masked, monkeypatch)


def test_through_the_public_function(kernel, serves_the_cpu):
    x, omega, y, h = inputs(70, 64, 20)

    def public(x, omega, y, h, mask, split):
        return update_sketch(x, omega, y, h, mask, split=split, backend="cuda")

    check_update(public, x, omega, y, h)
    sketch_cases.check_nothing_changes(public, x * torch.nan, omega, y, h)


# ---------------------------------------------------------------- on a GPU


@pytest.fixture
def on_gpu():
    reason = extension.unavailable("sketch", GPU)
    return pytest.skip(reason) if reason else None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_sizes_on_a_gpu(on_gpu, many_panels, dtype):
    for width in WIDTHS:
        sketch_cases.check_exact_products(by_cuda, *inputs(150, 136, width, dtype, GPU))
        sketch_cases.check_masked_rows_are_not_read(by_cuda, *inputs(130, 96, width, dtype, GPU))
    for shape in SHAPES:
        check_update(by_cuda, *inputs(*shape, dtype, GPU))


@pytest.mark.gpu
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_sizes(on_gpu, shape, split):
    x, omega, y, h = inputs(*shape, torch.bfloat16, GPU)
    mask = torch.arange(len(x), device=GPU) % 50 > 0
    check_update(by_cuda, x, omega, y, h, mask, split)
    sketch_cases.check_same_bits(by_cuda, x, omega, y, h, split=split, times=20)
    x[4000, 4000] = torch.inf
    sketch_cases.check_nothing_changes(by_cuda, x, omega, y, h)


@pytest.mark.gpu
def test_cuda_graph_replays_with_new_values(on_gpu):
    x, omega, y, h = inputs(8192, 4096, 128, torch.bfloat16, GPU)
    updated(by_cuda, x, omega, y, h)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trace = by_cuda(x, omega, y, h)
    for _ in range(3):
        x.normal_()
        expected = updated(by_cuda, x, omega, y, h)
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip((y, h, trace), expected, strict=True))


@pytest.mark.gpu
def test_streams_do_not_meet(on_gpu):
    cases = [inputs(2048, 4096, width, torch.bfloat16, GPU) for width in (32, 64, 128, 184)]
    expected = [updated(by_cuda, *case) for case in cases]
    torch.cuda.synchronize()
    got = []
    for case in cases:
        with torch.cuda.stream(torch.cuda.Stream()):
            got.append([updated(by_cuda, *case) for _ in range(8)])
    torch.cuda.synchronize()
    for runs, want in zip(got, expected, strict=True):
        for run in runs:
            assert all(torch.equal(*pair) for pair in zip(run, want, strict=True))


@pytest.mark.gpu
def test_work_of_a_stream_keeps_its_order(on_gpu):
    x, omega, y, h = inputs(4096, 4096, 64, torch.bfloat16, GPU)
    expected = updated(by_cuda, x, omega, y, h)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        late = torch.empty_like(x)
        torch.cuda._sleep(10_000_000)
        late.copy_(x)
        got = updated(by_cuda, late, omega, y, h)
        late.fill_(torch.nan)
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
