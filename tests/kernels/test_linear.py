"""Projected linears, one or several that share x: values, every gradient, dropout, precision, saved
tensors; bad input of a single one."""

import functools
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import (
    GRADIENTS,
    GROUP,
    ONE,
    activation_projection,
    check_against_exact,
    check_backward,
    check_forward,
    linears,
    make_inputs,
    operands,
    run,
)
from tolerance import assert_close_to_exact
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import nsru_kernels as nk
from nsru_kernels.ops.linear import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
one_and_group = pytest.mark.parametrize("sizes", [ONE, GROUP], ids=["one", "group"])


@pytest.mark.parametrize("ns", [(24,), (24, 9)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_library_adds_the_small_product_first_or_last(dtype, ns):
    args = operands(20, 40, ns, (3, 2)[: len(ns)], dtype)
    for plan in reference.PLANS:
        check_forward(reference, args, plan=plan)
        check_backward(reference, args, plan=plan)
    first, last = (reference.forward(*args, plan=plan)[0][0] for plan in reference.PLANS)
    assert dtype == torch.float32 or not torch.equal(first, last), "rounded in another order"


@one_and_group
@pytest.mark.parametrize("q", [0, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_every_gradient(dtype, q, sizes):
    check_against_exact(*make_inputs(q=q, dtype=dtype, **sizes))


@one_and_group
@pytest.mark.parametrize("m", [0, 1, 63, (), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_and_empty_leading_shapes(m, dtype, sizes):
    check_against_exact(*make_inputs(m, dtype=dtype, **sizes))


def test_no_features():
    inputs, _ = make_inputs((2, 3), k=1)
    empty = {name: inputs[name][..., :0] for name in ("x", "weight", "lora_a")}
    check_against_exact({**inputs, **empty}, None)
    adapter = [empty["lora_a"]], [inputs["lora_b"]]
    (y,) = nk.nsru_linear_group(empty["x"], [empty["weight"]], *adapter, scalings=[1.0])
    assert torch.equal(y, torch.zeros(2, 3, 20))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    m=st.integers(0, 9),
    k=st.integers(1, 17),
    n=st.integers(1, 17),
    r=st.integers(1, 5),
    q=st.integers(0, 8),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_size(m, k, n, r, q, bias, dtype):
    # With Q near K nothing but rounding would be left to compare.
    inputs, basis = make_inputs(m, k, n, r, min(q, k // 2), dtype=dtype)
    if not bias:
        del inputs["bias"]
    check_against_exact(inputs, basis)


def seeded(dropout_p, **arguments):
    """``nsru_linear`` with the same mask in every call; without dropout also for groups."""
    torch.manual_seed(3)
    if dropout_p:
        return nk.nsru_linear(**arguments, scaling=0.7, dropout_p=dropout_p)
    return tuple(linears(**arguments))


one_with_dropout_and_group = pytest.mark.parametrize(
    ("sizes", "dropout_p"), [(ONE, 0.0), (ONE, 0.5), (GROUP, 0.0)], ids=["one", "dropout", "group"]
)


@one_with_dropout_and_group
def test_gradcheck(sizes, dropout_p):
    inputs, basis = make_inputs(5, 9, **(sizes or {"n": 6, "r": 3}), q=4, dtype=torch.float64)

    def call(*leaves):
        return seeded(dropout_p, **dict(zip(inputs, leaves, strict=True)), basis=basis)

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in inputs.values()])


@one_with_dropout_and_group
def test_each_gradient_by_itself_and_subsets(sizes, dropout_p):
    """A gradient must not depend on which others are asked for: all subsets, pairs of a group's."""
    inputs, basis = make_inputs(**sizes)
    function = functools.partial(seeded, dropout_p, basis=basis)
    _, together = run(function, inputs)
    # An A of a group by itself is projected in another number of rows, which rounds differently.
    tolerance = 1e-6 if sizes else 0
    for size in range(1, 3 if sizes else len(inputs)):
        for wanted in itertools.combinations(inputs, size):
            _, alone = run(function, inputs, wanted)
            for name in wanted:
                torch.testing.assert_close(
                    alone[name], together[name], rtol=tolerance, atol=tolerance
                )


@one_and_group
def test_without_any_gradient(sizes):
    inputs, basis = make_inputs(**sizes)
    assert not any(y.requires_grad for y in linears(**inputs, basis=basis))


@one_and_group
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(dtype, sizes):
    inputs, basis = make_inputs((3, 5), dtype=dtype, **sizes)
    inputs["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    for suffix in ("0", "1") if sizes else ("",):  # the third of a group stays as it is
        names = [name + suffix for name in ("weight", "lora_a", "lora_b")]
        weight, lora_a, lora_b = names
        inputs[weight] = inputs[weight].T.contiguous().T
        inputs[lora_a] = inputs[lora_a].repeat_interleave(2, 1)[:, ::2]
        inputs[lora_b] = inputs[lora_b].T.contiguous().T
        assert not any(inputs[name].is_contiguous() for name in ("x", *names))
    outputs = sizes.get("n", (20,))
    permuted = [torch.randn(n, 5, 3).permute(2, 1, 0) for n in outputs]
    check_against_exact(inputs, basis.T.contiguous().T, dys=permuted)
    check_against_exact(inputs, basis, dys=[torch.ones(()).expand(3, 5, n) for n in outputs])


@one_and_group
def test_gradients_have_the_dtype_and_layout_of_their_parameters(sizes):
    inputs, basis = make_inputs(dtype=torch.bfloat16, adapter=torch.float32, **sizes)
    _, grads = run(functools.partial(linears, basis=basis), inputs)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert grad.stride() == inputs[name].stride()


class Dropout:
    """The mask that nsru_linear drew after ``torch.manual_seed(seed)``, seen through identities."""

    def __init__(self, x, dropout_p, seed):
        eye = torch.eye(x.shape[-1], dtype=x.dtype)
        torch.manual_seed(seed)
        self.dropped = nk.nsru_linear(x, torch.zeros_like(eye), eye, eye, dropout_p=dropout_p)
        self.mask = self.dropped / x


def test_dropout_keeps_each_element_with_its_probability_and_rescales():
    x = torch.ones(400, 50)
    mask = Dropout(x, 0.3, seed=1).mask
    torch.testing.assert_close(mask.unique(), torch.tensor([0, 1 / 0.7]))
    assert abs((mask == 0).double().mean() - 0.3) < 0.02


def test_dropout_is_reproducible_and_differs_between_calls():
    x = torch.randn(20, 30)
    assert torch.equal(Dropout(x, 0.5, 1).mask, Dropout(x, 0.5, 1).mask)
    assert not torch.equal(Dropout(x, 0.5, 1).mask, Dropout(x, 0.5, 2).mask)
    torch.manual_seed(1)
    eye = torch.eye(30)
    first, second = (nk.nsru_linear(x, eye, eye, eye, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_gradients_carry_the_forward_mask(dtype):
    """With the mask written out, plain autograd gives the same gradients; dX carries it too."""
    inputs, basis = make_inputs(11, dtype=dtype)
    mask = Dropout(torch.ones_like(inputs["x"]), 0.4, seed=5).mask.double()

    def masked(x, weight, bias, lora_a, lora_b, basis):
        update = activation_projection(
            x * mask.to(x.dtype), torch.zeros_like(weight), lora_a, lora_b, basis=basis
        )
        return torch.nn.functional.linear(x, weight, bias) + update

    def ours(**leaves):
        torch.manual_seed(5)
        return nk.nsru_linear(**leaves, basis=basis, dropout_p=0.4)

    got = run(ours, inputs)
    eager = run(functools.partial(masked, basis=basis), inputs)
    exact = run(
        functools.partial(masked, basis=basis.double()),
        {n: t.double() for n, t in inputs.items()},
    )
    assert_close_to_exact(got[0], eager[0], exact[0], "y")
    for name in GRADIENTS:
        grads = (got[1][name], eager[1][name], exact[1][name])
        assert_close_to_exact(*grads, f"d{name}", precision=dtype)


def test_dropout_of_everything_and_of_nothing():
    inputs, basis = make_inputs()
    _, all_dropped = run(functools.partial(nk.nsru_linear, basis=basis, dropout_p=1.0), inputs)
    y = nk.nsru_linear(**inputs, basis=basis, dropout_p=1.0)
    torch.testing.assert_close(y, inputs["x"] @ inputs["weight"].T + inputs["bias"])
    assert not all_dropped["lora_a"].any()
    before = torch.get_rng_state()
    nk.nsru_linear(**inputs, basis=basis, dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), before)


@one_and_group
def test_the_gradient_of_a_stays_in_the_null_space_of_a_rounded_basis(sizes):
    inputs, basis = make_inputs(9, k=256, q=16, **sizes)
    basis = basis.bfloat16()
    _, grads = run(functools.partial(linears, basis=basis), inputs)
    for name in filter(re.compile("lora_a").match, grads):
        assert (grads[name] @ basis.float()).norm() / grads[name].norm() < 1e-6


class RecordCopies(TorchDispatchMode):
    """Sizes of everything that is cast or copied."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (
            torch.ops.aten._to_copy,
            torch.ops.aten.clone,
            torch.ops.aten.copy_,
        ):
            self.sizes.append(out.numel())
        return out


@one_and_group
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_adapters_never_cast_or_copy_x_or_y(dtype, sizes):
    inputs, basis = make_inputs((2, 32), dtype=dtype, **sizes)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    dys = [torch.randn(2, 32, n).to(dtype) for n in sizes.get("n", (20,))]
    with RecordCopies() as copies:
        ys = linears(**leaves, basis=basis)
        torch.autograd.grad(ys, list(leaves.values()), dys)
    assert copies.sizes, "the adapters are cast"
    # The largest that may be: Ā of all linears, or the basis.
    rank = sum(t.shape[0] for name, t in inputs.items() if name.startswith("lora_a"))
    assert max(copies.sizes) <= max(rank * 24, basis.numel())


def test_adapters_of_any_dtype():
    kinds = torch.float32, torch.bfloat16, torch.float64
    for adapter in kinds:
        inputs, basis = make_inputs(dtype=torch.bfloat16, adapter=adapter)
        _, grads = run(functools.partial(nk.nsru_linear, basis=basis), inputs)
        assert grads["lora_a"].dtype == grads["lora_b"].dtype == adapter
    check_against_exact(*make_inputs(dtype=torch.bfloat16, adapter=kinds, **GROUP))


@one_and_group
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_nn_linear(x, weight, autocast, sizes):
    """Values, dtypes and gradients, with backward called inside the block."""
    inputs, basis = make_inputs((3, 3), **sizes)
    for name in filter(re.compile("x|weight|bias").match, inputs):
        inputs[name] = inputs[name].to(x if name == "x" else weight)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    suffix = "0" if sizes else ""
    with torch.autocast("cpu", dtype=autocast):
        ys = linears(**leaves, basis=basis)
        frozen = [leaves[name] for name in ("x", "weight" + suffix, "bias" + suffix)]
        assert torch.nn.functional.linear(*frozen).dtype == autocast
        assert all(y.dtype == autocast for y in ys)
        loss = sum(y.float().square().sum() for y in ys)
        grads = torch.autograd.grad(loss, list(leaves.values()))
    cast_leaves = {
        n: (t.detach() if n.startswith("lora") else t.detach().to(autocast)).requires_grad_()
        for n, t in leaves.items()
    }
    expected = linears(**cast_leaves, basis=basis)
    for y, want in zip(ys, expected, strict=True):
        torch.testing.assert_close(y, want, rtol=0, atol=0)
    loss = sum(y.float().square().sum() for y in expected)
    plain = torch.autograd.grad(loss, list(cast_leaves.values()))
    for name, grad, want in zip(leaves, grads, plain, strict=True):
        assert grad.dtype == leaves[name].dtype
        torch.testing.assert_close(grad, want.to(grad.dtype), rtol=0, atol=0, msg=f"d{name}")


def test_autocast_leaves_float64_alone():
    inputs, basis = make_inputs(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = nk.nsru_linear(**inputs, basis=basis)
    torch.testing.assert_close(y, nk.nsru_linear(**inputs, basis=basis), rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_gradient_checkpointing(use_reentrant, dropout_p):
    inputs, basis = make_inputs()

    def seeded(*, checkpointed, **leaves):
        torch.manual_seed(3)
        call = functools.partial(nk.nsru_linear, basis=basis, dropout_p=dropout_p)
        if not checkpointed:
            return call(**leaves)
        order = ("x", "weight", "lora_a", "lora_b", "bias")
        return checkpoint(
            lambda x, w, a, b, bias: call(x, w, a, b, bias=bias),
            *[leaves[n] for n in order],
            use_reentrant=use_reentrant,
        )

    # torch.autograd.grad is not allowed with reentrant checkpoints, backward is.
    grads = []
    for checkpointed in (False, True):
        leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        seeded(checkpointed=checkpointed, **leaves).square().sum().backward()
        grads.append([leaves[n].grad for n in GRADIENTS])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


@one_with_dropout_and_group
def test_saved_tensors_and_arguments_are_never_written_to(sizes, dropout_p):
    inputs, basis = make_inputs((2, 3), **sizes)
    leaves = [t.requires_grad_() for t in inputs.values()]
    saved = []

    def pack(tensor):
        saved.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = seeded(dropout_p, **inputs, basis=basis)
    ys = [result] if dropout_p else list(result)
    dys = [torch.randn_like(y) for y in ys]
    held = [*leaves, basis, *ys, *dys]
    before = [t.detach().clone() for t in held]
    first = torch.autograd.grad(ys, leaves, dys, retain_graph=True)
    second = torch.autograd.grad(ys, leaves, dys)
    assert all(map(torch.equal, first, second))
    assert saved
    assert all(torch.equal(tensor, copy) for tensor, copy in saved)
    assert all(map(torch.equal, held, before))


def test_an_in_place_edit_of_x_before_backward_is_refused_not_miscomputed():
    inputs, basis = make_inputs()
    inputs["lora_a"].requires_grad_()
    y = nk.nsru_linear(**inputs, basis=basis)
    inputs["x"].add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        y.sum().backward()


@one_and_group
def test_double_backward_is_refused(sizes):
    inputs, basis = make_inputs(**sizes)
    x = inputs["x"].requires_grad_()
    y = linears(**inputs, basis=basis)[0]
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        dx.sum().backward()


@one_with_dropout_and_group
def test_meta_tensors_give_shapes(sizes, dropout_p):
    inputs, basis = make_inputs((2, 3), dtype=torch.bfloat16, **sizes)
    leaves = {n: t.to("meta").requires_grad_() for n, t in inputs.items()}
    result = seeded(dropout_p, **leaves, basis=basis.bfloat16().to("meta"))
    ys = [result] if dropout_p else result
    assert all(y.is_meta for y in ys)
    assert [tuple(y.shape) for y in ys] == [(2, 3, n) for n in sizes.get("n", (20,))]
    sum(y.sum() for y in ys).backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves.values())


BAD = {
    "x [..., K]": ({"x": torch.ones(3, 5)}, r"x must be \[\.\.\., K=24\].*got \(3, 5\)"),
    "x scalar": ({"x": torch.ones(())}, r"x must be \[\.\.\., K=24\].*got \(\)"),
    "x dtype": ({"x": torch.ones(3, 24).bfloat16()}, r"x \(torch.bfloat16\) and weight .*autocast"),
    "x integer": ({"x": torch.ones(3, 24).long()}, r"x \(torch.int64\) and weight"),
    "weight": ({"weight": torch.ones(24)}, r"weight must be \[N, K\], got \(24,\)"),
    "lora_a K": ({"lora_a": torch.ones(4, 5)}, r"lora_a must be \[R ≥ 1, K=24\].*\(4, 5\)"),
    "lora_a 1-D": ({"lora_a": torch.ones(24)}, r"lora_a must be \[R ≥ 1, K=24\].*\(24,\)"),
    "lora_a R=0": ({"lora_a": torch.ones(0, 24)}, r"lora_a must be \[R ≥ 1, K=24\]"),
    "lora_a dtype": ({"lora_a": torch.ones(4, 24).int()}, "lora_a must be a floating.*int32"),
    "lora_b": ({"lora_b": torch.ones(4, 20)}, r"lora_b must be .*\[N=20, R=4\].*\(4, 20\)"),
    "lora_b dtype": ({"lora_b": torch.ones(20, 4).int()}, "lora_b must be a floating.*int32"),
    "bias": ({"bias": torch.ones(3)}, r"bias must be \[N=20\] in torch.float32, got \(3,\)"),
    "bias dtype": ({"bias": torch.ones(20).half()}, "bias must be .*float32, got .*float16"),
    "basis K": ({"basis": torch.ones(48, 6)}, r"basis must be .*\[K=24, Q\].*\(48, 6\).*another"),
    "basis 1-D": ({"basis": torch.ones(24).bfloat16()}, r"basis must be .*\[K=24, Q\].*\(24,\)"),
    "basis wide": ({"basis": torch.ones(24, 25)}, r"basis must be .*Q ≤ K, got \(24, 25\)"),
    "basis integer": ({"basis": torch.ones(24, 2).int()}, "basis must be a floating.*int32"),
    "basis gradient": ({"basis": torch.ones(24, 2, requires_grad=True)}, r"basis\.detach\(\)"),
    "dropout": ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\], got 1.5"),
    "dropout NaN": ({"dropout_p": float("nan")}, r"dropout_p must be in \[0, 1\], got nan"),
    "backend": ({"backend": "cudnn"}, "backend must be 'auto' or one of .*got 'cudnn'"),
    "x device": ({"x": torch.ones(3, 24, device="meta")}, "x is on meta, weight on cpu. Move"),
    "basis device": ({"basis": torch.ones(24, 2, device="meta")}, "basis is on meta, lora_a on"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_argument_expected_and_got(case):
    inputs, basis = make_inputs()
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        nk.nsru_linear(**{**inputs, "basis": basis, **change})


def test_a_sharded_weight_is_refused():
    class DTensor(torch.Tensor):
        pass

    inputs, basis = make_inputs()
    inputs["weight"] = inputs["weight"].as_subclass(DTensor)
    with pytest.raises(TypeError, match=r"weight is a DTensor.*full_tensor"):
        nk.nsru_linear(**inputs, basis=basis)


def test_dropout_is_refused_while_a_graph_is_captured(monkeypatch):
    """The mask's seed would be part of the graph: every replay would drop the same elements."""
    inputs, basis = make_inputs()
    monkeypatch.setattr("nsru_kernels.ops.linear.capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="repeat one mask at every replay"):
        nk.nsru_linear(**inputs, basis=basis, dropout_p=0.1)
    assert nk.nsru_linear(**inputs, basis=basis).isfinite().all()
