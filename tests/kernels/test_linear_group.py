"""nsru_linear_group: every value and gradient, subsets, unused outputs, compile, bad input."""

import functools
import itertools

import pytest
import torch
from linear_cases import activation_projection, make_basis
from tolerance import assert_close_to_exact

import nsru_kernels as nk
from nsru_kernels.ops.products import rank_columns

K, Q = 24, 6
SIZES = ((20, 4), (7, 3), (13, 2))  # N_i, R_i
SCALINGS = (1.7, 0.5, 3.0)


def make_group(m=7, *, dtype=torch.float32, adapters=None, bias=(True, False, True), seed=0):
    """({x, weight0, ..., bias0, ..., lora_a0, ..., lora_b0, ...}, orthonormal basis)."""
    draw = functools.partial(
        torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    adapters = adapters or (wide,) * len(SIZES)
    inputs = {"x": draw(*((m,) if isinstance(m, int) else m), K).to(dtype)}
    for i, ((n, r), adapter) in enumerate(zip(SIZES, adapters, strict=True)):
        inputs[f"weight{i}"] = (draw(n, K) / K**0.5).to(dtype)
        inputs[f"lora_a{i}"] = (draw(r, K) / K**0.5).to(adapter)
        inputs[f"lora_b{i}"] = draw(n, r).to(adapter)
        if bias[i]:
            inputs[f"bias{i}"] = draw(n).to(dtype)
    return inputs, make_basis(K, Q).to(wide)


def group(basis, inputs, **options):
    lists = {
        name: [inputs.get(f"{name}{i}") for i in range(len(SIZES))]
        for name in ("weight", "lora_a", "lora_b", "bias")
    }
    return nk.nsru_linear_group(
        inputs["x"], lists["weight"], lists["lora_a"], lists["lora_b"], basis, lists["bias"],
        **{"scalings": SCALINGS, **options},
    )  # fmt: skip


def singles(basis, inputs, function=activation_projection):
    return [
        function(
            inputs["x"], inputs[f"weight{i}"], inputs[f"lora_a{i}"], inputs[f"lora_b{i}"],
            bias=inputs.get(f"bias{i}"), basis=basis, scaling=scaling,
        )
        for i, scaling in enumerate(SCALINGS)
    ]  # fmt: skip


def run(function, inputs, wanted=None, used=(0, 1, 2), dys=None):
    """(ys, {name: gradient or None}) with only ``used`` outputs going into the loss."""
    wanted = tuple(inputs) if wanted is None else wanted
    leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in inputs.items()}
    ys = function(inputs=leaves)
    if dys is None:
        g = torch.Generator().manual_seed(9)
        dys = [torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype) for y in ys]
    used = [i for i in used if ys[i].requires_grad]
    grads = torch.autograd.grad(
        [ys[i] for i in used], [leaves[n] for n in wanted], [dys[i].to(ys[i].dtype) for i in used],
        allow_unused=True,
    )  # fmt: skip
    return [y.detach() for y in ys], dict(zip(wanted, grads, strict=True))


def check_against_exact(inputs, basis, **options):
    exact_inputs = {n: t.double() for n, t in inputs.items()}
    exact_basis = None if basis is None else basis.double()
    got = run(functools.partial(group, basis), inputs, **options)
    eager = run(functools.partial(singles, basis), inputs, **options)
    exact = run(functools.partial(singles, exact_basis), exact_inputs, **options)
    for i, triple in enumerate(zip(got[0], eager[0], exact[0], strict=True)):
        assert_close_to_exact(*triple, f"y{i}")
    for name, value in exact[1].items():
        if value is None:
            assert got[1][name] is None, f"d{name}: nothing depends on it"
            continue
        grads = (got[1][name], eager[1][name], value)
        assert_close_to_exact(*grads, f"d{name}", precision=inputs["x"].dtype)
        assert got[1][name].is_contiguous() == inputs[name].is_contiguous(), name


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_every_value_and_gradient(dtype, projected):
    inputs, basis = make_group(dtype=dtype)
    check_against_exact(inputs, basis if projected else None)


@pytest.mark.parametrize("m", [0, 1, 63, (), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_and_empty_leading_shapes(m, dtype):
    check_against_exact(*make_group(m, dtype=dtype))


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_outputs_that_nobody_uses(used):
    check_against_exact(*make_group((2, 3)), used=used)


def test_adapters_of_different_dtypes():
    inputs, basis = make_group(
        dtype=torch.bfloat16, adapters=(torch.float32, torch.bfloat16, torch.float64)
    )
    check_against_exact(inputs, basis)


def test_a_basis_in_bf16_and_no_bias():
    inputs, basis = make_group(bias=(False,) * 3)
    expected = singles(basis.bfloat16(), inputs, nk.nsru_linear)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    ys = group(basis.bfloat16(), leaves)
    for y, want in zip(ys, expected, strict=True):
        torch.testing.assert_close(y, want)
    sum(y.square().sum() for y in ys).backward()
    u = basis.bfloat16().float()
    for i in range(3):
        assert (inputs[f"lora_a{i}"].grad @ u).norm() < 1e-5 * inputs[f"lora_a{i}"].grad.norm()


def test_gradcheck():
    inputs, basis = make_group(5, dtype=torch.float64)
    names = list(inputs)

    def call(*leaves):
        return tuple(group(basis, dict(zip(names, leaves, strict=True))))

    assert torch.autograd.gradcheck(call, [inputs[n].requires_grad_() for n in names])


def test_each_gradient_by_itself_and_pairs_of_them():
    """A gradient must not depend on which others are asked for."""
    inputs, basis = make_group()
    function = functools.partial(group, basis)
    _, together = run(function, inputs)
    for size in (1, 2):
        for wanted in itertools.combinations(inputs, size):
            _, some = run(function, inputs, wanted)
            for name in wanted:
                # Not bit by bit: an A alone is folded in another number of rows.
                torch.testing.assert_close(some[name], together[name], rtol=1e-6, atol=1e-6)


def test_without_any_gradient():
    inputs, basis = make_group()
    assert not any(y.requires_grad for y in group(basis, inputs))


def test_strides_do_not_matter():
    inputs, basis = make_group((3, 5))
    inputs["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["weight1"] = inputs["weight1"].T.contiguous().T
    inputs["lora_a0"] = inputs["lora_a0"].repeat_interleave(2, 1)[:, ::2]
    inputs["lora_b0"] = inputs["lora_b0"].T.contiguous().T
    got = run(functools.partial(group, basis), inputs)
    plain = {n: t.contiguous() for n, t in inputs.items()}
    want = run(functools.partial(group, basis), plain)
    for a, b in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(a, b)
    for name in inputs:
        torch.testing.assert_close(got[1][name], want[1][name])
    dys = [torch.randn(n, 5, 3).permute(2, 1, 0) for n, _ in SIZES[:2]]
    check_against_exact(plain, basis, dys=[*dys, torch.ones(()).expand(3, 5, 13)])


def test_outputs_may_be_edited_in_place_like_those_of_a_linear():
    for m in (4, (2, 3)):
        inputs, basis = make_group(m)
        inputs["x"].requires_grad_()
        q, k, _ = group(basis, inputs)
        torch.relu_(q).sum().backward(retain_graph=True)
        k.mul_(2).sum().backward()
        torch.relu_(nk.nsru_linear(inputs["x"], *list(inputs.values())[1:4])).sum().backward()


def test_saved_tensors_and_arguments_are_never_written_to():
    inputs, basis = make_group((2, 3))
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    saved = []

    def pack(tensor):
        saved.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ys = group(basis, leaves)
    held = [*leaves.values(), basis, *ys]
    before = [t.detach().clone() for t in held]
    dys = [torch.randn_like(y) for y in ys]
    dys_before = [dy.clone() for dy in dys]
    first = torch.autograd.grad(ys, list(leaves.values()), dys, retain_graph=True)
    second = torch.autograd.grad(ys, list(leaves.values()), dys)
    assert all(map(torch.equal, first, second))
    assert saved
    assert all(torch.equal(tensor, copy) for tensor, copy in saved)
    assert all(map(torch.equal, held, before))
    assert all(map(torch.equal, dys, dys_before))


def test_double_backward_is_refused():
    inputs, basis = make_group()
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(group(basis, inputs)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_that_of_nn_linear(x, weight):
    inputs, basis = make_group((2, 4))
    for name in inputs:
        if not name.startswith("lora"):
            inputs[name] = inputs[name].to(x if name == "x" else weight)

    def under_autocast(function, inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(basis, inputs)

    got = run(functools.partial(under_autocast, group), inputs)
    want = run(
        functools.partial(under_autocast, functools.partial(singles, function=nk.nsru_linear)),
        inputs,
    )
    for a, b in zip(got[0], want[0], strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=2e-2, atol=5e-2)
    for name, grad in want[1].items():
        assert got[1][name].dtype == inputs[name].dtype
        torch.testing.assert_close(got[1][name], grad, rtol=3e-2, atol=0.1, msg=f"d{name}")


@pytest.mark.parametrize("used", [(0, 1, 2), (1,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_compiled_graph_gives_the_eager_result(dtype, used):
    torch._dynamo.reset()
    inputs, basis = make_group((2, 5), dtype=dtype)

    def some(inputs):
        ys = group(basis, inputs)
        return [ys[i] for i in used]

    compiled = torch.compile(some, fullgraph=True, backend="aot_eager")
    got, want = (run(f, inputs, used=range(len(used))) for f in (compiled, some))
    for a, b in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for name, grad in want[1].items():
        # A compiled graph may hand out zeros where eager hands out None.
        found = got[1][name]
        want_or_zero = torch.zeros_like(inputs[name]) if grad is None else grad
        torch.testing.assert_close(torch.zeros_like(inputs[name]) if found is None else found,
                                   want_or_zero, rtol=0, atol=0)  # fmt: skip


@pytest.mark.parametrize("m", [5, 0])
def test_opcheck(m):
    opcheck = functools.partial(
        torch.library.opcheck,
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_dynamic",
        ),
    )
    inputs, _ = make_group(m)
    x, weights = inputs["x"].T.contiguous().T, [inputs[f"weight{i}"] for i in range(3)]
    a = torch.cat([inputs[f"lora_a{i}"] for i in range(3)])
    bs = [inputs[f"lora_b{i}"] for i in range(3)]
    biases = [inputs.get(f"bias{i}") for i in range(3)]
    opcheck(
        torch.ops.nsru.linear_group_forward, (x, weights, a, bs, biases, list(SCALINGS), "auto")
    )
    s = torch.randn(m, a.shape[0])
    dys = [torch.randn(n, m).T for n, _ in SIZES]
    for dy, needs in (
        (dys, [True] * 11),
        ([dys[0], None, dys[2]], [True] * 11),
        (dys, [False, True] + [False] * 6 + [True, False, True]),
    ):
        args = (dy, x, weights, a, bs, s, list(SCALINGS), needs, "auto")
        opcheck(torch.ops.nsru.linear_group_backward, args)


def test_meta_tensors_give_shapes():
    inputs, basis = make_group((2, 3))
    leaves = {n: t.to("meta").requires_grad_() for n, t in inputs.items()}
    ys = group(basis.to("meta"), leaves)
    assert [tuple(y.shape) for y in ys] == [(2, 3, n) for n, _ in SIZES]
    sum(y.sum() for y in ys).backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves.values())


def test_the_parts_of_s_belong_to_their_siblings():
    s = torch.arange(9.0).expand(2, 9)
    parts = rank_columns(s, [torch.ones(n, r) for n, r in SIZES])
    assert [part[0].tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6], [7, 8]]


BAD = {
    "no weights": ({"weights": []}, "weights must hold at least one matrix, got none"),
    "scalings": ({"scalings": [1.0]}, r"scalings must hold one entry per weight \(2\), got 1"),
    "biases": ({"biases": [None] * 3}, r"biases must hold one entry per weight \(2\), got 3"),
    "lora_as": ({"lora_as": [torch.ones(2, 5)]}, r"lora_as must hold one entry .*\(2\), got 1"),
    "x": ({"x": torch.ones(3, 4)}, r"index 0: x must be \[\.\.\., K=5\].*got \(3, 4\)"),
    "x dtype": ({"x": torch.ones(3, 5).half()}, r"index 0: x \(torch.float16\) and weight"),
    "another K": (
        {"weights": [torch.ones(6, 5), torch.ones(7, 4)]},
        r"index 1: x must be \[\.\.\., K=4\].*got \(3, 5\)",
    ),
    "lora_a": (
        {"lora_as": [torch.ones(2, 5), torch.ones(3, 4)]},
        r"index 1: lora_a must be \[R ≥ 1, K=5\].*got \(3, 4\)",
    ),
    "lora_b": (
        {"lora_bs": [torch.ones(6, 2), torch.ones(3, 7)]},
        r"index 1: lora_b must be .*\[N=7, R=3\].*got \(3, 7\)",
    ),
    "bias": ({"biases": [None, torch.ones(6)]}, r"index 1: bias must be \[N=7\].*got \(6,\)"),
    "basis": ({"basis": torch.ones(4, 2)}, r"index 0: basis must be .*\[K=5, Q\].*got \(4, 2\)"),
    "backend": ({"backend": "gpu"}, "backend must be 'auto' or one of .*got 'gpu'"),
    "device": ({"x": torch.ones(3, 5, device="meta")}, "index 0: x is on meta, weight on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_argument_and_index(case):
    change, message = BAD[case]
    arguments = {
        "x": torch.ones(3, 5),
        "weights": [torch.ones(6, 5), torch.ones(7, 5)],
        "lora_as": [torch.ones(2, 5), torch.ones(3, 5)],
        "lora_bs": [torch.ones(6, 2), torch.ones(7, 3)],
        "scalings": [1.0, 2.0],
    }
    with pytest.raises(ValueError, match=message):
        nk.nsru_linear_group(**{**arguments, **change})


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_named_backend_never_falls_back(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs, basis = make_group()
    with pytest.raises(nk.BackendUnavailable, match=rf"backend='{backend}' cannot serve"):
        group(basis, inputs, backend=backend)
