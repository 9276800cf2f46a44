"""The grouped kernel against float64: any mix of sizes, dtypes, strides and shared bases.

Without a GPU it is interpreted.
"""

import pytest
import torch
from linear_cases import make_basis
from tolerance import assert_close_to_exact

import nsru_kernels as nk
from nsru_kernels import BackendUnavailable
from nsru_kernels.dispatch import choose
from nsru_kernels.ops.project import reference, tables
from nsru_kernels.ops.project.autograd import project_groups
from nsru_kernels.ops.project.gram import gram_inverse_of

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
from nsru_kernels.ops.project import triton as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHORT = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Whatever a launcher allocates without a value starts as NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-1)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def project_many():
    return kernel.project_many


def draw(r, k, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed + 10 * r + k)
    return torch.randn(r, k, generator=g, dtype=torch.float64).to(DEVICE, dtype)


def basis(k, q, dtype=torch.float32, seed=0):
    return make_basis(k, q, seed).to(DEVICE, dtype)


def check(project_many, adapters, bases):
    """fold_many of a kernel against float64, entry by entry."""
    cores = [gram_inverse_of(u) for u in bases]
    projected = project_many(adapters, bases, cores)
    for i, (got, a, u, core) in enumerate(zip(projected, adapters, bases, cores, strict=True)):
        assert got.dtype == torch.float32
        assert got.is_contiguous()
        exact = reference.project(a.double(), u.double(), core)
        assert_close_to_exact(got, reference.project(a, u, core), exact, f"adapter {i}")
    return projected


@pytest.mark.parametrize("k", [17, 63, 130])
@pytest.mark.parametrize("r", [1, 3, 16, 40])
def test_odd_sizes(project_many, k, r):
    """One launch per call: a full-rank basis, tiny ones, and more columns than one tile holds."""
    ranks = [q for q in (1, 5, 70) if q <= k]
    check(project_many, [draw(r, k, seed=q) for q in ranks], [basis(k, q) for q in ranks])


def test_aligned_sizes_in_several_chunks(project_many):
    check(
        project_many,
        [draw(16, 576), draw(33, 576), draw(4, 80)],
        [basis(576, 80), basis(576, 16), basis(80, 64)],
    )


@pytest.mark.parametrize("aligned", [True, False])
def test_adapters_that_share_a_basis_become_one_problem(project_many, monkeypatch, aligned):
    found, sort = [], tables.sort
    monkeypatch.setattr(tables, "sort", lambda *args: found.append(sort(*args)) or found[-1])
    k = 64 if aligned else 63
    shared, own = basis(k, 16), basis(k, 16, seed=5)
    check(project_many, [draw(r, k) for r in (16, 3, 7, 16, 2)], [shared, shared, own, shared, own])
    ((kind, problems),) = found[0].items()
    assert kind.is_aligned == aligned
    assert [problem.rows for problem in problems] == [35, 9]
    assert [problem.adapters for problem in problems] == [[0, 1, 3], [2, 4]]


@pytest.mark.parametrize("basis_dtype", SHORT, ids=str)
@pytest.mark.parametrize(("k", "q"), [(130, 70), (320, 96)])
def test_rounded_bases_with_their_core(project_many, basis_dtype, k, q):
    adapters = [draw(3, k), draw(17, k, seed=1)]
    bases = [basis(k, q, basis_dtype), basis(k, q, basis_dtype, seed=3)]
    projected = check(project_many, adapters, bases)
    for a, u, got in zip(adapters, bases, projected, strict=True):
        assert leakage(got, u, a) <= 1e-6
        uncorrected = project_many([a], [u], [None])[0]
        assert leakage(uncorrected, u, a) > 1e-5, "the core does something"


@pytest.mark.parametrize("adapter_dtype", SHORT, ids=str)
def test_short_adapters(project_many, adapter_dtype):
    """Every pair of dtypes in one call, aligned or not: several launches."""
    adapters, bases = [], []
    for basis_dtype in (torch.float32, *SHORT):
        for k, q in ((64, 16), (63, 5)):
            adapters.append(draw(4, k, adapter_dtype))
            bases.append(basis(k, q, basis_dtype))
    check(project_many, [*adapters, draw(2, 64)], [*bases, bases[0]])


def test_weighted_basis(project_many):
    u, weights = make_basis(130, 20), torch.linspace(0, 1, 20, dtype=torch.float64)
    soft = u * weights.sqrt()
    check(project_many, [draw(5, 130)] * 2, [soft.float().to(DEVICE), soft.bfloat16().to(DEVICE)])


def test_strides(project_many):
    wide, k, q = draw(12, 200), 65, 33
    rows = wide[::3, 7 : 7 + k]
    transposed = draw(k, 4).T
    expanded = draw(1, k).expand(5, k)
    column_major = basis(k, q).T.contiguous().T
    sliced = torch.cat([basis(k, q)] * 2, dim=1)[:, 3 : 3 + q]
    sliced_aligned = torch.cat([basis(64, 16), torch.full((64, 16), 9.0, device=DEVICE)], dim=1)
    check(project_many, [rows, transposed, expanded], [column_major, sliced, column_major])
    check(project_many, [wide[::2, 16:80]], [sliced_aligned[:, :16]])


@pytest.mark.parametrize(("k", "q", "offset"), [(63, 20, 3), (80, 48, 16)])
def test_nothing_beyond_the_operands_is_read(project_many, k, q, offset):
    """Neighbours in memory are NaN: a load that is not masked shows."""
    surrounded_a = torch.full((9, k + 2 * offset), float("nan"), device=DEVICE)
    surrounded_u = torch.full((k + 40, q + 2 * offset), float("nan"), device=DEVICE)
    a, u = surrounded_a[2:5, offset : offset + k], surrounded_u[:k, offset : offset + q]
    a.copy_(draw(3, k))
    u.copy_(basis(k, q))
    check(project_many, [a], [u])


def test_empty_operands(project_many):
    adapters = [
        draw(3, 8),
        draw(3, 8)[:0],
        torch.ones(3, 0, device=DEVICE),
        draw(2, 8, torch.float16),
    ]
    bases = [basis(8, 2)[:, :0], basis(8, 2), torch.ones(0, 0, device=DEVICE), basis(8, 1)[:, :0]]
    projected = project_many(adapters, bases, [None] * 4)
    for got, a in zip(projected, adapters, strict=True):
        assert torch.equal(got, a.float())
        assert got.data_ptr() != a.data_ptr() or not a.numel()


def test_public_call_with_and_without_bases():
    adapters = [draw(4, 40), draw(3, 40, torch.float16), draw(2, 40)]
    bases = [basis(40, 6), None, basis(40, 8, torch.bfloat16)]
    projected = nk.project_adapters(adapters, bases, backend="triton")
    assert projected[1] is adapters[1]
    for i in (0, 2):
        exact = nk.project_adapter(adapters[i].double(), bases[i], backend="eager")
        eager = nk.project_adapter(adapters[i], bases[i], backend="eager")
        assert_close_to_exact(projected[i], eager, exact)


def test_gradients():
    shared, rounded = basis(130, 9), basis(40, 8, torch.bfloat16)
    leaves = [draw(3, 130), draw(2, 130, torch.float16), draw(4, 40)]
    bases = [shared, shared, rounded]

    def gradients(by, dtype=None):
        inputs = [(a if dtype is None else a.to(dtype)).requires_grad_() for a in leaves]
        projected = nk.project_adapters(inputs, bases, backend=by)
        loss = sum((f.float() if dtype is None else f).square().sum() * 0.5 for f in projected)
        return torch.autograd.grad(loss, inputs)

    leaves = [a.detach() for a in leaves]
    results = zip(
        gradients("triton"), gradients("eager"), gradients("eager", torch.float64), strict=True
    )
    for got, eager, exact in results:
        assert exact.norm() > 0
        assert_close_to_exact(got, eager, exact)


def leakage(projected, u, adapter):
    return ((projected.double() @ u.double()).norm() / adapter.double().norm()).item()


def test_leakage_gate(project_many):
    a, u = draw(16, 1024), basis(1024, 64)
    projected = project_many([a], [u], [None])[0]
    assert leakage(projected, u, a) <= 1e-6
    assert leakage(a, u, a) > 0.1, "there was something to remove"


def test_many_problems_in_one_call(project_many):
    """More items than blocks are on the device at a time, and blocks that wait for others."""
    shared = [basis(k, q, dtype) for k, q in ((272, 80), (160, 112)) for dtype in SHORT]
    own = [basis(48, 16, seed=i) for i in range(12)]
    adapters = [draw(r, len(u), seed=r) for u in shared for r in (16, 8, 20)]
    check(project_many, [*adapters, *(draw(4, 48, seed=i) for i in range(12))],
          [*(u for u in shared for _ in range(3)), *own])  # fmt: skip


def test_launches_are_bit_identical(project_many):
    adapters, bases = [draw(20, 576), draw(3, 63)], [basis(576, 70), basis(63, 5, torch.bfloat16)]
    cores = [gram_inverse_of(u) for u in bases]
    first = project_many(adapters, bases, cores)
    second = project_many(adapters, bases, cores)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_what_is_kept_of_a_launch_knows_no_adapter(project_many, monkeypatch):
    """A second call with others of the same sizes makes no table, and reads those."""
    bases = [basis(64, 16), basis(64, 16), basis(63, 5)]
    for seed in (0, 1):
        check(project_many, [draw(3, len(u), seed=seed) for u in bases], bases)
        monkeypatch.setattr(tables, "sort", None)


def test_kept_launches_are_few(project_many):
    for seed in range(tables._MOST_KEPT + 3):
        check(project_many, [draw(2, 40)], [basis(40, 4, seed=seed)])
    assert len(tables._kept) == tables._MOST_KEPT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_groups_on_top_of_each_other_in_the_dtype_of_the_activations(dtype):
    shared, rounded = basis(64, 16), basis(63, 5, torch.bfloat16)
    groups = [([draw(4, 64), draw(3, 64, torch.float16)], shared), ([draw(2, 63)], rounded)]
    results = project_groups(groups, dtype, "triton")
    by_library = project_groups(groups, dtype, "eager")
    for got, eager, (lora_as, u) in zip(results, by_library, groups, strict=True):
        stacked = torch.cat([a.double() for a in lora_as])
        exact = reference.project(stacked, u.double(), gram_inverse_of(u))
        assert_close_to_exact(got, eager, exact)


@pytest.mark.parametrize("lag", [0, 1000, 1 << 24])
def test_items_wait_only_for_smaller_tickets(lag):
    """Else programs that hold the larger numbers could fill the device and wait for ever."""
    tiles = tables.Tiles(rows=32, out=64)
    sizes = tuple(
        tables.Size(k, q, rows, core, 4)
        for k, q, rows, core in ((4096, 256, 48, False), (300, 1, 1, True), (63, 63, 33, False))
    )
    plan = tables.schedule(sizes, tiles, lag)
    items = torch.from_numpy(plan.items)
    problem, index = items >> 32, items & 0xFFFFFFFF
    position = torch.arange(len(plan.items))
    for i, size in enumerate(sizes):
        blocks = -(-size.rows // 32)
        along = blocks * -(-size.Q // 64) * -(-size.K // size.chunk)
        count = along + blocks * -(-size.K // 64)
        mine = problem == i
        assert index[mine].sort().values.tolist() == list(range(count)), "each item once"
        first_phase = position[mine & (index < along)]
        assert first_phase.max() < position[mine & (index >= along)].min()


def test_table_handed_over_as_arguments_equals_a_copy(project_many, monkeypatch):
    """The way into a CUDA graph, which may not copy from host memory that is gone at replay."""
    a, u = draw(3, 63), basis(63, 5)
    expected = project_many([a], [u], [None])[0]
    for values in ([1, 0, -5, 2**40, 2**33, 7, 2**62, 16, 3], range(5000)):
        table = torch.tensor(values)
        written = kernel.write_table(table, torch.device(DEVICE))
        assert torch.equal(written[: len(table)].cpu(), table)
    monkeypatch.setattr(tables, "to_device", lambda table, device, write: write(table, device))
    tables._kept.clear()
    assert torch.equal(project_many([a], [u], [None])[0], expected)


def test_a_captured_table_of_a_whole_model_takes_few_launches(monkeypatch):
    """One compiled kernel for all of them, whatever the values."""
    layer = ((4096, 3), (4096, 1), (4096, 2), (14336, 1))
    sizes = [tables.Size(k, 256, 16 * n, False, 4) for k, n in layer * 32]
    plan = tables.schedule(tuple(sizes), tables.Tiles(32, 64), tables.LAG)
    described = torch.arange(11 * len(sizes) + 2 * 224 * 16) * 2**33 - 5
    table, lengths = torch.cat([described, torch.from_numpy(plan.items)]), []

    def write(out, words, **options):
        lengths.append(len(words))
        out[: len(words)] = torch.tensor(words, dtype=torch.int32)

    monkeypatch.setattr(kernel, "write_table_kernel", {(1,): write})
    written = kernel.write_table(table, torch.device("cpu"))
    assert torch.equal(written[: len(table)], table)
    assert len(lengths) < 100
    assert set(lengths) == {kernel._WORDS_PER_WRITE}


def test_a_default_device_does_not_matter(project_many):
    a, u = draw(3, 63), basis(63, 5)
    tables.schedule.cache_clear()
    tables._kept.clear()
    with torch.device("meta"):
        projected = project_many([a], [u], [None])[0]
    assert torch.equal(projected, project_many([a], [u], [None])[0])


def test_refuses_float64():
    a, u = draw(2, 8, torch.float64), basis(8, 2)
    with pytest.raises(BackendUnavailable, match=r"triton.*float64"):
        nk.project_adapter(a, u, backend="triton")
    with pytest.raises(BackendUnavailable, match=r"triton.*float64"):
        nk.project_adapter(a.float(), u.double(), backend="triton")


def test_triton_refuses_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choose.cache_clear()
    with pytest.raises(BackendUnavailable, match="CUDA device"):
        nk.project_adapter(torch.ones(2, 8), make_basis(8, 2).float(), backend="triton")
    choose.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("basis_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_8b_model(project_many, basis_dtype):
    torch.manual_seed(0)
    adapters, bases = [], []
    for _ in range(32):
        for k, sharing in ((4096, 3), (4096, 1), (4096, 2), (14336, 1)):
            u = torch.linalg.qr(torch.randn(k, 256, device=DEVICE)).Q.contiguous().to(basis_dtype)
            adapters += [torch.randn(16, k, device=DEVICE) for _ in range(sharing)]
            bases += [u] * sharing
    cores = [gram_inverse_of(u) for u in bases]
    projected = project_many(adapters, bases, cores)
    for a, u, core, got in zip(adapters, bases, cores, projected, strict=True):
        exact = reference.project(a.double(), u, core)
        assert_close_to_exact(got, reference.project(a, u, core), exact)
        assert leakage(got, u, a) <= 1e-6
    again = project_many(adapters, bases, cores)
    assert all(torch.equal(x, y) for x, y in zip(projected, again, strict=True))


@pytest.mark.gpu
def test_replay_of_a_cuda_graph_reads_the_new_adapter(project_many):
    a, u = draw(16, 576), basis(576, 70)
    project_many([a], [u], [None])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (got,) = project_many([a], [u], [None])
    a.copy_(draw(16, 576, seed=4))
    torch.empty(1 << 20, dtype=torch.int64, pin_memory=True)  # what a freed table would become
    graph.replay()
    assert torch.equal(got, project_many([a], [u], [None])[0])


@pytest.mark.gpu
def test_streams_do_not_meet(project_many):
    pairs = [(draw(16, 4096, seed=i), basis(4096, 256, seed=i)) for i in range(4)]
    expected = [project_many([a], [u], [None])[0] for a, u in pairs]
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream() for _ in pairs], []
    for stream, (a, u) in zip(streams, pairs, strict=True):
        with torch.cuda.stream(stream):
            got.append([project_many([a], [u], [None])[0] for _ in range(8)])
    torch.cuda.synchronize()
    for runs, value in zip(got, expected, strict=True):
        assert all(torch.equal(run, value) for run in runs)
