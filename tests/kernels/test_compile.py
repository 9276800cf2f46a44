"""torch.compile and the registered ops: whole graphs, the same numbers, no needless recompiles."""

import functools
import shutil

import pytest
import torch
from linear_cases import GRADIENTS, make_basis, make_inputs, opcheck, run
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import nsru_kernels as nk
from nsru_kernels.ops.project import gram


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("dtype", "m", "dropout_p"),
    [(torch.float32, 5, 0.0), (torch.bfloat16, 5, 0.5), (torch.bfloat16, 0, 0.0)],
    ids=str,
)
def test_opcheck_linear(dtype, m, dropout_p):
    inputs, _ = make_inputs(m, dtype=dtype, adapter=dtype)
    x = inputs["x"].T.contiguous().T
    weight, a, b = inputs["weight"], inputs["lora_a"], inputs["lora_b"]
    seed = torch.tensor(7) if dropout_p else None
    bias = inputs["bias"] if m else None
    opcheck(
        torch.ops.nsru.linear_forward,
        (x, [weight], a, [b], [bias], [1.5], dropout_p, seed, "auto"),
    )
    dy, s = torch.randn(20, m).to(dtype).T, torch.randn(m, 4).to(dtype)
    for needs in ([True] * 5, [True, True, False, False, False]):
        opcheck(
            torch.ops.nsru.linear_backward,
            ([dy], x, [weight], a, [b], s, [1.5], dropout_p, seed, needs, "auto"),
        )


def test_opcheck_project_and_gram_inverse():
    a = [torch.randn(3, 16), torch.randn(16, 2).T.bfloat16(), torch.randn(4, 8).double()]
    basis = [make_basis(16, 4).float(), make_basis(16, 5).bfloat16(), make_basis(8, 2)]
    gram_inverses = [None, torch.eye(5), None]
    opcheck(torch.ops.nsru.project, (a, basis, gram_inverses, "auto"))
    opcheck(torch.ops.nsru.gram_inverse, (basis[1],))


@pytest.mark.parametrize("basis_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_function_in_one_graph_gives_the_eager_result(basis_dtype, dropout_p):
    inputs, basis = make_inputs((2, 5), dtype=torch.bfloat16)
    basis = None if basis_dtype is None else basis.to(basis_dtype)
    function = functools.partial(nk.nsru_linear, basis=basis, dropout_p=dropout_p)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    y, grads = run(compiled, inputs)
    torch.manual_seed(3)
    y_eager, eager = run(function, inputs)
    torch.testing.assert_close(y, y_eager, rtol=0, atol=0)
    for name in GRADIENTS:
        torch.testing.assert_close(grads[name], eager[name], rtol=0, atol=0)


def test_project_adapters_in_one_graph():
    bases = [make_basis(16, 4).float(), make_basis(16, 5).bfloat16()]
    leaves = [torch.randn(3, 16, requires_grad=True) for _ in bases]

    def loss(leaves):
        return sum(f.square().sum() for f in nk.project_adapters(leaves, bases))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        torch.autograd.grad(compiled(leaves), leaves),
        torch.autograd.grad(loss(leaves), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def two_layers(dtype=torch.float32, basis_dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 8)).to(dtype)
    subspaces = {"0": make_basis(16, 4).to(basis_dtype), "2": make_basis(12, 3).to(basis_dtype)}
    nk.swap_linears(model, "all-linear", rank=3, alpha=6, subspaces=subspaces)
    nn.init.normal_(model[0].lora_B)
    nn.init.normal_(model[2].lora_B)
    return model


def train_step(forward, model, x):
    model.zero_grad()
    loss = forward(x).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def test_module_in_one_graph_follows_every_optimizer_step():
    model = two_layers()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(5, 16)
    for _ in range(3):
        got, want = (train_step(forward, model, x) for forward in (compiled, model))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        optimizer.step()


def test_autocast_in_one_graph():
    model = two_layers()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = (train_step(forward, model, x) for forward in (compiled, model))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_batch_sizes_share_one_dynamic_graph():
    model = two_layers()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for m in (4, 5, 6, 7, 64, 33):
        x = torch.randn(m, 16)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count <= 2, "one graph for the first size, one for all others"


def test_compiled_graph_computes_the_correction_of_a_bf16_basis_once(monkeypatch):
    calls = []
    gram_inverse = gram.gram_inverse
    monkeypatch.setattr(gram, "gram_inverse", lambda basis: calls.append(1) or gram_inverse(basis))
    model = two_layers(torch.bfloat16, torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 16).bfloat16()
    compiled(x)
    calls.clear()
    got = [compiled(x) for _ in range(3)][-1]
    assert not calls
    torch.testing.assert_close(got, model(x))
    model[0].subspace.basis.mul_(0.5)
    got = compiled(x)
    assert len(calls) == 1
    torch.testing.assert_close(got, model(x))


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="inductor needs a C++ compiler on a CPU",
)
def test_inductor():
    inputs, basis = make_inputs(5, dtype=torch.bfloat16)
    function = functools.partial(nk.nsru_linear, basis=basis.bfloat16())
    y, grads = run(torch.compile(function, fullgraph=True, dynamic=False), inputs)
    y_eager, eager = run(function, inputs)
    torch.testing.assert_close(y, y_eager)
    for name in GRADIENTS:
        torch.testing.assert_close(grads[name], eager[name])


def test_the_projection_is_recorded_and_needs_no_memory():
    a, u = torch.randn(4, 24), make_basis(24, 6).float()
    graph = make_fx(lambda a: nk.project_adapter(a, u))(a)
    assert torch.ops.nsru.project.default in {node.target for node in graph.graph.nodes}
    other = torch.randn(4, 24)
    assert torch.equal(graph(other), nk.project_adapter(other, u))
    with FakeTensorMode() as mode:
        projected = nk.project_adapter(mode.from_tensor(a), mode.from_tensor(u))
    assert projected.shape == (4, 24)
