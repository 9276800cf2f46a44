"""The backend for CPUs with AMX: bf16 against float64, no worse than eager.

Without AMX a stand-in reads the addresses that it is given and multiplies with PyTorch, which
checks what Python hands over. What only the kernels themselves can show needs AMX.
"""

import functools
import os
import types
from pathlib import Path

import cpu_stand_in
import linear_cases
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import nsru_kernels as nk
from nsru_kernels.dispatch import choose, cpu_extension
from nsru_kernels.ops.linear import cpu

try:
    from nsru_kernels import _cpu
except ImportError:
    _cpu = None

UNAVAILABLE = cpu_extension.unavailable(torch.device("cpu"))
needs_amx = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
BF16 = torch.bfloat16
by_cpu = functools.partial(nk.nsru_linear, backend="cpu")
operands = functools.partial(linear_cases.operands, device="cpu")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    if UNAVAILABLE is not None:
        monkeypatch.setattr(cpu_extension, "load", lambda: cpu_stand_in)
        monkeypatch.setattr(cpu_extension, "_unavailable", lambda: None)
        choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(
    ("m", "k", "n", "r"),
    [
        (1, 1, 1, 1),
        (63, 70, 33, 5),
        (7, 2100, 40, 16),
        (130, 96, 300, 33),
        (300, 640, 520, 70),
        (600, 40, 2, 8),
    ],
)
def test_one_linear_agrees_with_float64(poisoned_memory, threads, count, m, k, n, r):
    threads(count)
    inputs, basis = linear_cases.make_inputs(m, k, n, r, min(6, k - 1), dtype=BF16)
    linear_cases.check_against_exact(inputs, basis, backend="cpu")


@pytest.mark.parametrize("wanted", [("x",), ("lora_a",), ("lora_b",), ("bias", "weight")])
def test_only_the_wanted_gradients_are_computed(poisoned_memory, wanted):
    inputs, basis = linear_cases.make_inputs(65, 80, 48, 4, dtype=BF16)
    linear_cases.check_against_exact(inputs, basis, wanted=wanted, backend="cpu")


@pytest.mark.parametrize("shape", [(0,), (2, 0), (3, 11)])
def test_leading_dimensions_and_no_tokens(shape):
    inputs, basis = linear_cases.make_inputs(shape, 24, 20, 4, dtype=BF16)
    linear_cases.check_against_exact(inputs, basis, backend="cpu")


def test_no_input_features_and_no_outputs():
    x, w, b = torch.ones(5, 0, dtype=BF16), torch.ones(3, 0, dtype=BF16), torch.ones(3, 2)
    bias = torch.arange(3).to(BF16)
    y = by_cpu(x, w, torch.ones(2, 0), b, bias=bias)
    assert torch.equal(y, bias.expand(5, 3))
    ys, s = cpu.forward(
        torch.ones(5, 4, dtype=BF16), [torch.ones(0, 4, dtype=BF16)], torch.ones(2, 4, dtype=BF16),
        [torch.ones(0, 2, dtype=BF16)], [None], [1.0],
    )  # fmt: skip
    assert ys[0].shape == (5, 0)
    assert torch.equal(s, torch.full((5, 2), 4.0, dtype=BF16))


GROUPS = [
    (37, 72, (40, 24, 64), (4, 16, 7)),
    (513, 300, (100, 33), (33, 40)),
    (40, 96, (64,), (8,)),
]


@pytest.mark.parametrize("case", GROUPS)
def test_groups_agree_with_float64(poisoned_memory, case):
    linear_cases.check_both_passes(cpu, case, BF16, device="cpu")


@pytest.mark.parametrize("unused", [(), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2, 5, 8), (0, 1, 8, 9, 10)])
def test_unused_outputs_and_unwanted_gradients(poisoned_memory, unused, wanted):
    linear_cases.check_some_gradients(cpu, GROUPS[0], BF16, unused, wanted, device="cpu")


def test_the_gradients_of_adapters_are_not_rounded():
    x, ws, a, bs, _, scalings = operands(70, 90, (40,), (5,), BF16)
    dy, s = torch.randn(70, 40).to(BF16), torch.randn(70, 5).to(BF16)
    needs = [False, True, False, False, True]
    _, da, _, _, db = cpu.backward([dy], x, ws, a, bs, s, scalings, 0.0, None, needs)
    assert da.dtype == db.dtype == torch.float32
    exact = scalings[0] * dy.double().T @ s.double()
    torch.testing.assert_close(db.double(), exact, rtol=1e-5, atol=1e-5)
    ds = (scalings[0] * dy.float() @ bs[0].float()).to(BF16)
    torch.testing.assert_close(da.double(), ds.double().T @ x.double(), rtol=1e-2, atol=1e-2)
    assert not torch.equal(da, da.to(BF16).float())


def strided(rows, columns):
    """[rows, columns] laid out in every way a caller might."""
    g = torch.Generator().manual_seed(3)
    draw = functools.partial(torch.randn, generator=g, dtype=BF16)
    return {
        "rows": draw(rows, columns),
        "columns": draw(columns, rows).T,
        "wider": draw(rows + 1, columns + 3)[1:, 2:-1],
        "every other": draw(rows, 2 * columns)[:, ::2],
        "one row": draw(columns).expand(rows, columns),
        "one column": draw(rows, 1).expand(rows, columns),
    }


@pytest.mark.parametrize("layout", strided(1, 1))
def test_any_strides(poisoned_memory, layout):
    m, k, n, r = 70, 50, 45, 6
    x, w, dy = strided(m, k)[layout], strided(n, k)[layout], strided(m, n)[layout]
    a, b, bias = strided(r, k)[layout], strided(n, r)[layout], strided(1, n)[layout][0]
    runs = []
    for tidy in (lambda tensor: tensor, torch.Tensor.contiguous):
        x, w, a, b, bias, dy = map(tidy, (x, w, a, b, bias, dy))
        (y,), s = cpu.forward(x, [w], a, [b], [bias], [1.5])
        grads = cpu.backward([dy], x, [w], a, [b], s, [1.5], 0.0, None, [True] * 5)
        runs.append((y, s, grads[0], grads[1], grads[4]))
    for name, got, expected in zip(("y", "s", "dx", "da", "db"), *runs, strict=True):
        assert torch.equal(got, expected), name


@needs_amx
def test_the_result_does_not_depend_on_the_number_of_threads(threads):
    args = operands(777, 1100, (300, 70), (16, 40), BF16)
    x, ws, a, bs, _, scalings = args
    dys = [torch.randn(777, n, dtype=BF16) for n in (300, 70)]
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        ys, s = cpu.forward(*args)
        needs = linear_cases.adapters_and_x(2)
        grads = cpu.backward(dys, x, ws, a, bs, s, scalings, 0.0, None, needs)
        results.append([*ys, s, *(grad for grad in grads if grad is not None)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_infinite_numbers_stay_in_their_rows():
    x, *others = operands(70, 90, (40, 33), (5, 3), BF16)
    clean, _ = cpu.forward(x, *others)
    x[3, 7], x[66, 80] = torch.inf, torch.nan
    found, _ = cpu.forward(x, *others)
    others = [i for i in range(70) if i not in (3, 66)]
    for y, expected in zip(found, clean, strict=True):
        assert torch.equal(y[others], expected[others])
        assert not y[[3, 66]].isfinite().any()


@needs_amx
def test_what_lies_around_the_operands_is_neither_read_nor_written():
    m, k, n, r = 33, 40, 35, 3
    around = [torch.full((rows + 2, columns + 2), torch.nan, dtype=BF16)
              for rows, columns in ((m, k), (n, k), (r, k), (n, r), (m, n), (m, r))]  # fmt: skip
    x, w, a, b, y, s = (t[1:-1, 1:-1] for t in around)
    for t in (x, w, a, b):
        t.copy_(torch.randn(t.shape))
    take = cpu_extension.Arguments()
    linear = (take.matrix(w), take.matrix(b), 2.0, 0, take.matrix(y))
    cpu_extension.load().forward(*map(take.matrix, (x, a, s)), [linear], 2)
    assert y.isfinite().all()
    assert s.isfinite().all()
    for whole, inner in zip(around, (x, w, a, b, y, s), strict=True):
        assert whole.isfinite().sum() == inner.numel()


def test_other_dtypes_and_dropout_are_refused_by_name(monkeypatch):
    inputs, basis = linear_cases.make_inputs(dtype=torch.float32)
    with pytest.raises(nk.BackendUnavailable, match=r"take bfloat16, got torch.float32.*'eager'"):
        by_cpu(**inputs, basis=basis)
    args = operands(3, 5, (4,), (2,), torch.float32)
    with pytest.raises(nk.BackendUnavailable, match=r"take bf16, got torch.float32\. Use 'eager'"):
        cpu.forward(*args)
    x, basis = linear_cases.make_inputs(dtype=BF16)
    with pytest.raises(nk.BackendUnavailable, match=r"no dropout, got 0\.5"):
        by_cpu(**x, basis=basis, dropout_p=0.5)
    monkeypatch.setenv("NSRU_BACKEND", "cpu")
    assert nk.explain("nsru_linear").backend == "cpu"
    assert nk.explain("project_adapters").backend == "cpu"


def test_compiles_as_a_whole():
    inputs, basis = linear_cases.make_inputs(33, 64, 48, dtype=BF16)

    def loss(x, weight, bias, lora_a, lora_b):
        y = by_cpu(x, weight, lora_a, lora_b, basis, bias)
        return y.float().square().sum()

    leaves = {name: t.clone().requires_grad_(name != "weight") for name, t in inputs.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    eager = torch.autograd.grad(loss(**leaves), wanted)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, two in zip(torch.autograd.grad(compiled(**leaves), wanted), eager, strict=True):
        torch.testing.assert_close(one, two)


def test_a_swapped_model_trains_with_it(monkeypatch):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("q_proj", "k_proj", "o_proj"):
                self.add_module(name, nn.Linear(64, 64, dtype=BF16))

        def forward(self, x):
            return self.o_proj(self.q_proj(x) + self.k_proj(x))

    module, calls = cpu_extension.load(), []
    counting = types.SimpleNamespace(
        forward=lambda *args: calls.append(1) or module.forward(*args),
        backward=module.backward,
        project=module.project,
    )
    monkeypatch.setattr(cpu_extension, "load", lambda: counting)
    model = Block()
    basis = linear_cases.make_basis(64, 8).float()
    names = ["q_proj", "k_proj", "o_proj"]
    nk.swap_linears(
        model, names, rank=4, alpha=8, subspaces=dict.fromkeys(names, basis), backend="cpu"
    )
    x = torch.randn(40, 64, dtype=BF16)
    for _ in range(3):
        model(x).float().square().sum().backward()
    assert len(calls) >= 6, "q and k together or apart, and o, three times"
    leak = model.q_proj.lora_A.grad @ basis
    assert leak.norm() <= 1e-4 * model.q_proj.lora_A.grad.norm() + 1e-4
    assert model.q_proj.lora_B.grad.abs().sum() > 0


def test_tensors_without_memory_take_another_way():
    inputs, _ = linear_cases.make_inputs(33, 64, 48, dtype=BF16)
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(t) for name, t in inputs.items()}
        y = by_cpu(**fakes)
    assert isinstance(y, torch._subclasses.FakeTensor)
    assert y.shape == (33, 48)
    zeros = torch._efficientzerotensor(33, 64, dtype=BF16)
    with pytest.raises(nk.BackendUnavailable, match=r"plain tensors.*Use 'eager'"):
        by_cpu(**{**inputs, "x": zeros})


def test_what_make_fx_records_computes():
    inputs, _ = linear_cases.make_inputs(33, 64, 48, dtype=BF16)
    x = inputs.pop("x")
    graph = make_fx(lambda x: by_cpu(x, **inputs))(x)
    other = torch.randn(33, 64).to(BF16)
    assert torch.equal(graph(other), by_cpu(other, **inputs))


def test_negated_views_are_read_as_negated():
    inputs, _ = linear_cases.make_inputs(33, 64, 48, dtype=BF16)
    negated = {
        **inputs,
        "x": torch._neg_view(inputs["x"]),
        "weight": torch._neg_view(inputs["weight"]),
    }
    plain = {**inputs, "x": -inputs["x"], "weight": -inputs["weight"]}
    assert torch.equal(by_cpu(**negated), by_cpu(**plain))


@needs_amx
def test_a_large_workspace_is_given_back():
    x = torch.zeros(600_000, 1, dtype=BF16)
    s = torch.ones(600_000, 33, dtype=BF16)
    w, a, b = (torch.ones(*shape, dtype=BF16) for shape in ((1, 1), (33, 1), (1, 33)))
    needs = [False, True, False, False, False]
    before = resident_bytes()
    _, da, *_ = cpu.backward([x], x, [w], a, [b], s, [1.0], 0.0, None, needs)
    assert resident_bytes() - before < 20 * 2**20 * torch.get_num_threads()
    assert not da.any()


def resident_bytes():
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def matrix(tensor):
    return None if tensor is None else (tensor.data_ptr(), *tensor.shape, *tensor.stride())


@pytest.mark.parametrize("unused", [(), (0,), (1, 2)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_arguments_are_handed_over_in_the_order_of_the_bindings(monkeypatch, count, unused):
    taken = []

    def taking(name):
        def call(*args):
            taken.append(args)
            if _cpu is not None:
                try:
                    getattr(_cpu, name)(*args)
                except RuntimeError as error:  # without AMX, once it has taken the arguments
                    assert str(error) == _cpu.unavailable()  # noqa: PT017

        return call

    module = types.SimpleNamespace(forward=taking("forward"), backward=taking("backward"))
    monkeypatch.setattr(cpu_extension, "load", lambda: module)
    ns, ranks = (40, 24, 64)[:count], (4, 16, 7)[:count]
    x, ws, a, bs, biases, scalings = operands(37, 72, ns, ranks, BF16)
    ys, s = cpu.forward(x, ws, a, bs, biases, scalings)
    dys = [None if i in unused else torch.randn_like(y) for i, y in enumerate(ys)]
    needs = linear_cases.adapters_and_x(count)
    dx, da, *others = cpu.backward(dys, x, ws, a, bs, s, scalings, 0.0, None, needs)
    assert others[: 2 * count] == [None] * 2 * count
    bias_addresses = [0 if bias is None else bias.data_ptr() for bias in biases]
    ends = (bias_addresses, map(matrix, ys)), (map(matrix, dys), map(matrix, others[2 * count :]))
    forward, backward = (
        list(zip(map(matrix, ws), map(matrix, bs), scalings, *end, strict=True)) for end in ends
    )
    threads, ds = torch.get_num_threads(), taken[1][3]
    first = [matrix(tensor) for tensor in (x, a, s)]
    assert taken == [
        (*first, forward, threads),
        (*first, ds, matrix(dx), matrix(da), backward, threads),
    ]
    assert ds[1:] == (*s.shape, *s.stride())
    assert ds[0] not in (tensor.data_ptr() for tensor in (x, a, s, dx, da))
