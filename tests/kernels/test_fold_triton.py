"""The grouped fold kernel against float64: any mix of sizes, dtypes, strides and shared bases."""

import pytest
import torch
from linear_cases import make_basis
from tolerance import assert_close_to_exact

import nsru_kernels as nk
from nsru_kernels import BackendUnavailable, dispatch
from nsru_kernels.ops.fold import reference
from nsru_kernels.ops.fold.core import core_of

triton_fold = pytest.importorskip("nsru_kernels.ops.fold.triton", exc_type=ImportError)
tables = pytest.importorskip("nsru_kernels.ops.fold.tables")

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


def draw(r, k, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed + 10 * r + k)
    return torch.randn(r, k, generator=g, dtype=torch.float64).to(DEVICE, dtype)


def basis(k, q, dtype=torch.float32, seed=0):
    return make_basis(k, q, seed).to(DEVICE, dtype)


def check(adapters, bases):
    """fold_many of the kernel against float64, entry by entry."""
    cores = [core_of(u) for u in bases]
    folded = triton_fold.fold_many(adapters, bases, cores)
    for i, (got, a, u, core) in enumerate(zip(folded, adapters, bases, cores, strict=True)):
        assert got.dtype == torch.float32
        assert got.is_contiguous()
        exact = reference.fold(a.double(), u.double(), core)
        assert_close_to_exact(got, reference.fold(a, u, core), exact, f"adapter {i}")
    return folded


@pytest.mark.parametrize("k", [17, 63, 130])
@pytest.mark.parametrize("r", [1, 3, 16, 40])
def test_odd_sizes(k, r):
    """One launch per call: a full-rank basis, tiny ones, and more columns than one tile holds."""
    ranks = [q for q in (1, 5, 70) if q <= k]
    check([draw(r, k, seed=q) for q in ranks], [basis(k, q) for q in ranks])


def test_aligned_sizes_in_several_chunks():
    check(
        [draw(16, 576), draw(33, 576), draw(4, 64)], [basis(576, 80), basis(576, 16), basis(64, 64)]
    )


@pytest.mark.parametrize("aligned", [True, False])
def test_adapters_that_share_a_basis_become_one_problem(monkeypatch, aligned):
    problems = []
    describe = triton_fold.describe
    monkeypatch.setattr(
        triton_fold, "describe", lambda p, plan: problems.append(p) or describe(p, plan)
    )
    k = 64 if aligned else 63
    shared, own = basis(k, 16), basis(k, 16, seed=5)
    check([draw(r, k) for r in (16, 3, 7, 16, 2)], [shared, shared, own, shared, own])
    (group,) = problems
    assert [problem.size.rows for problem in group] == [35, 9]
    assert all(tables.aligned(problem) == aligned for problem in group)


@pytest.mark.parametrize("basis_dtype", SHORT, ids=str)
@pytest.mark.parametrize(("k", "q"), [(130, 70), (320, 96)])
def test_rounded_bases_with_their_core(basis_dtype, k, q):
    adapters = [draw(3, k), draw(17, k, seed=1)]
    bases = [basis(k, q, basis_dtype), basis(k, q, basis_dtype, seed=3)]
    folded = check(adapters, bases)
    for a, u, got in zip(adapters, bases, folded, strict=True):
        assert leakage(got, u, a) <= 1e-6
        uncorrected = triton_fold.fold_many([a], [u], [None])[0]
        assert leakage(uncorrected, u, a) > 1e-5, "the core does something"


@pytest.mark.parametrize("adapter_dtype", SHORT, ids=str)
def test_short_adapters(adapter_dtype):
    """Every pair of dtypes in one call, aligned or not: several launches."""
    adapters, bases = [], []
    for basis_dtype in (torch.float32, *SHORT):
        for k, q in ((64, 16), (63, 5)):
            adapters.append(draw(4, k, adapter_dtype))
            bases.append(basis(k, q, basis_dtype))
    check([*adapters, draw(2, 64)], [*bases, bases[0]])


def test_weighted_basis():
    u, weights = make_basis(130, 20), torch.linspace(0, 1, 20, dtype=torch.float64)
    soft = u * weights.sqrt()
    check([draw(5, 130)] * 2, [soft.float().to(DEVICE), soft.bfloat16().to(DEVICE)])


def test_strides():
    wide, k, q = draw(12, 200), 65, 33
    rows = wide[::3, 7 : 7 + k]
    transposed = draw(k, 4).T
    expanded = draw(1, k).expand(5, k)
    column_major = basis(k, q).T.contiguous().T
    sliced = torch.cat([basis(k, q)] * 2, dim=1)[:, 3 : 3 + q]
    sliced_aligned = torch.cat([basis(64, 16), torch.full((64, 16), 9.0, device=DEVICE)], dim=1)
    check([rows, transposed, expanded], [column_major, sliced, column_major])
    check([wide[::2, 16:80]], [sliced_aligned[:, :16]])


def test_nothing_beyond_the_operands_is_read():
    """Neighbours in memory are NaN: a load that is not masked shows."""
    k, q = 63, 20
    surrounded_a = torch.full((9, k + 9), float("nan"), device=DEVICE)
    surrounded_u = torch.full((k + 40, q + 5), float("nan"), device=DEVICE)
    surrounded_a[2:5, 4 : 4 + k] = draw(3, k)
    surrounded_u[:k, 2 : 2 + q] = basis(k, q)
    check([surrounded_a[2:5, 4 : 4 + k]], [surrounded_u[:k, 2 : 2 + q]])


def test_empty_operands():
    adapters = [
        draw(3, 8),
        draw(3, 8)[:0],
        torch.ones(3, 0, device=DEVICE),
        draw(2, 8, torch.float16),
    ]
    bases = [basis(8, 2)[:, :0], basis(8, 2), torch.ones(0, 0, device=DEVICE), basis(8, 1)[:, :0]]
    folded = triton_fold.fold_many(adapters, bases, [None] * 4)
    for got, a in zip(folded, adapters, strict=True):
        assert torch.equal(got, a.float())
        assert got.data_ptr() != a.data_ptr() or not a.numel()


def test_public_call_with_and_without_bases():
    adapters = [draw(4, 40), draw(3, 40, torch.float16), draw(2, 40)]
    bases = [basis(40, 6), None, basis(40, 8, torch.bfloat16)]
    folded = nk.project_adapters(adapters, bases, backend="triton")
    assert folded[1] is adapters[1]
    for i in (0, 2):
        exact = nk.project_adapter(adapters[i].double(), bases[i], backend="eager")
        eager = nk.project_adapter(adapters[i], bases[i], backend="eager")
        assert_close_to_exact(folded[i], eager, exact)


def test_gradients():
    shared, rounded = basis(130, 9), basis(40, 8, torch.bfloat16)
    leaves = [draw(3, 130), draw(2, 130, torch.float16), draw(4, 40)]
    bases = [shared, shared, rounded]

    def gradients(backend, dtype=None):
        inputs = [(a if dtype is None else a.to(dtype)).requires_grad_() for a in leaves]
        folded = nk.project_adapters(inputs, bases, backend=backend)
        loss = sum((f.float() if dtype is None else f).square().sum() * 0.5 for f in folded)
        return torch.autograd.grad(loss, inputs)

    leaves = [a.detach() for a in leaves]
    results = zip(
        gradients("triton"), gradients("eager"), gradients("eager", torch.float64), strict=True
    )
    for got, eager, exact in results:
        assert exact.norm() > 0
        assert_close_to_exact(got, eager, exact)


def leakage(folded, u, adapter):
    return ((folded.double() @ u.double()).norm() / adapter.double().norm()).item()


def test_leakage_gate():
    a, u = draw(16, 1024), basis(1024, 64)
    folded = triton_fold.fold_many([a], [u], [None])[0]
    assert leakage(folded, u, a) <= 1e-6
    assert leakage(a, u, a) > 0.1, "there was something to remove"


def test_launches_are_bit_identical():
    adapters, bases = [draw(20, 576), draw(3, 63)], [basis(576, 70), basis(63, 5, torch.bfloat16)]
    cores = [core_of(u) for u in bases]
    first = triton_fold.fold_many(adapters, bases, cores)
    second = triton_fold.fold_many(adapters, bases, cores)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("lag", [0, 1000, 1 << 24])
def test_items_wait_only_for_smaller_tickets(lag):
    """Else programs that hold the larger numbers could fill the device and wait for ever."""
    tiles = tables.Tiles(rows=32, out=64)
    sizes = tuple(
        tables.Size(k, q, rows, core, 4)
        for k, q, rows, core in ((4096, 256, 48, False), (300, 1, 1, True), (63, 63, 33, False))
    )
    plan = tables.schedule(sizes, tiles, lag)
    problem, index = plan.items >> 32, plan.items & 0xFFFFFFFF
    position = torch.arange(len(plan.items))
    for i, size in enumerate(sizes):
        blocks = -(-size.rows // 32)
        along = blocks * -(-size.Q // 64) * -(-size.K // size.chunk)
        count = along + blocks * -(-size.K // 64)
        mine = problem == i
        assert index[mine].sort().values.tolist() == list(range(count)), "each item once"
        first_phase = position[mine & (index < along)]
        assert first_phase.max() < position[mine & (index >= along)].min()


def test_table_handed_over_as_arguments_equals_a_copy(monkeypatch):
    """The way into a CUDA graph, which may not copy from host memory that is gone at replay."""
    a, u = draw(3, 63), basis(63, 5)
    expected = triton_fold.fold_many([a], [u], [None])[0]
    table = torch.tensor([1, 0, -5, 2**40, 2**33, 7, 2**62, 16, 3])
    assert triton_fold.write_table(table, torch.device(DEVICE))[:9].tolist() == table.tolist()
    monkeypatch.setattr(triton_fold, "to_device", triton_fold.write_table)
    assert torch.equal(triton_fold.fold_many([a], [u], [None])[0], expected)


def test_refuses_float64():
    a, u = draw(2, 8, torch.float64), basis(8, 2)
    with pytest.raises(BackendUnavailable, match="float64"):
        nk.project_adapter(a, u, backend="triton")
    with pytest.raises(BackendUnavailable, match="float64"):
        nk.project_adapter(a.float(), u.double(), backend="triton")


def test_refuses_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._named.cache_clear()
    with pytest.raises(BackendUnavailable, match="CUDA device"):
        nk.project_adapter(torch.ones(2, 8), make_basis(8, 2).float(), backend="triton")
    dispatch._named.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("basis_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_8b_model(basis_dtype):
    torch.manual_seed(0)
    adapters, bases = [], []
    for _ in range(32):
        for k, sharing in ((4096, 3), (4096, 1), (4096, 2), (14336, 1)):
            u = torch.linalg.qr(torch.randn(k, 256, device=DEVICE)).Q.contiguous().to(basis_dtype)
            adapters += [torch.randn(16, k, device=DEVICE) for _ in range(sharing)]
            bases += [u] * sharing
    cores = [core_of(u) for u in bases]
    folded = triton_fold.fold_many(adapters, bases, cores)
    for a, u, core, got in zip(adapters, bases, cores, folded, strict=True):
        exact = reference.fold(a.double(), u, core)
        assert_close_to_exact(got, reference.fold(a, u, core), exact)
        assert leakage(got, u, a) <= 1e-6
    again = triton_fold.fold_many(adapters, bases, cores)
    assert all(torch.equal(x, y) for x, y in zip(folded, again, strict=True))


@pytest.mark.gpu
def test_replay_of_a_cuda_graph_reads_the_new_adapter():
    a, u = draw(16, 576), basis(576, 70)
    triton_fold.fold_many([a], [u], [None])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (got,) = triton_fold.fold_many([a], [u], [None])
    a.copy_(draw(16, 576, seed=4))
    torch.empty(1 << 20, dtype=torch.int64, pin_memory=True)  # what a freed table would become
    graph.replay()
    assert torch.equal(got, triton_fold.fold_many([a], [u], [None])[0])
