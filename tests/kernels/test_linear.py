"""nsru_linear: values, every gradient, dropout, precision, saved tensors, bad input."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import GRADIENTS, activation_projection, check_against_exact, make_inputs, run
from tolerance import assert_close_to_exact
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import nsru_kernels as nk

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("q", [0, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_every_gradient(dtype, q):
    inputs, basis = make_inputs(q=q, dtype=dtype)
    check_against_exact(inputs, basis)


@pytest.mark.parametrize("m", [0, 1, 63, (), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_and_empty_leading_shapes(m, dtype):
    check_against_exact(*make_inputs(m, dtype=dtype))


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
    check_against_exact(inputs, basis, wanted=tuple(inputs))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p):
    inputs, basis = make_inputs(5, 9, 6, 3, 4, dtype=torch.float64)

    def seeded(x, weight, bias, lora_a, lora_b):
        torch.manual_seed(3)
        return nk.nsru_linear(
            x, weight, lora_a, lora_b, basis, bias, scaling=0.7, dropout_p=dropout_p
        )

    leaves = [inputs[n].requires_grad_() for n in GRADIENTS]
    assert torch.autograd.gradcheck(seeded, leaves)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_each_gradient_by_itself_and_every_subset(dropout_p):
    """A gradient must not depend on which others are asked for."""
    inputs, basis = make_inputs()

    def seeded(**leaves):
        torch.manual_seed(3)
        return nk.nsru_linear(**leaves, basis=basis, dropout_p=dropout_p)

    _, together = run(seeded, inputs)
    for size in range(1, len(GRADIENTS)):
        for wanted in itertools.combinations(GRADIENTS, size):
            _, alone = run(seeded, inputs, wanted)
            for name in wanted:
                torch.testing.assert_close(alone[name], together[name], rtol=0, atol=0)


def test_without_any_gradient():
    inputs, basis = make_inputs()
    assert not nk.nsru_linear(**inputs, basis=basis).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(dtype):
    inputs, basis = make_inputs((3, 5), dtype=dtype)
    dy = torch.randn(20, 5, 3).permute(2, 1, 0)
    inputs["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["weight"] = inputs["weight"].T.contiguous().T
    inputs["lora_a"] = inputs["lora_a"].repeat_interleave(2, 1)[:, ::2]
    inputs["lora_b"] = inputs["lora_b"].T.contiguous().T
    assert not any(inputs[n].is_contiguous() for n in ("x", "weight", "lora_a", "lora_b"))
    check_against_exact(inputs, basis.T.contiguous().T, dy=dy)
    check_against_exact(inputs, basis, dy=torch.ones(()).expand(3, 5, 20))


def test_gradients_have_the_dtype_and_layout_of_their_parameters():
    inputs, basis = make_inputs(dtype=torch.bfloat16, adapter=torch.float32)
    _, grads = run(functools.partial(nk.nsru_linear, basis=basis), inputs)
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


def test_the_gradient_of_a_stays_in_the_null_space_of_a_rounded_basis():
    inputs, basis = make_inputs(9, k=256, q=16)
    basis = basis.bfloat16()
    _, grads = run(functools.partial(nk.nsru_linear, basis=basis), inputs)
    assert (grads["lora_a"] @ basis.float()).norm() / grads["lora_a"].norm() < 1e-6


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_adapters_never_cast_or_copy_x_or_y(dtype):
    m, k, n, r, q = 64, 24, 20, 4, 6
    inputs, basis = make_inputs((2, m // 2), k, n, r, q, dtype=dtype)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    dy = torch.randn(2, m // 2, n).to(dtype)
    with RecordCopies() as copies:
        y = nk.nsru_linear(**leaves, basis=basis)
        torch.autograd.grad(y, list(leaves.values()), dy)
    assert copies.sizes, "the adapters are cast"
    assert max(copies.sizes) <= max(r * k, r * n, k * q)


def test_adapters_of_any_dtype():
    for adapter in (torch.float32, torch.bfloat16, torch.float64):
        inputs, basis = make_inputs(dtype=torch.bfloat16, adapter=adapter)
        _, grads = run(functools.partial(nk.nsru_linear, basis=basis), inputs)
        assert grads["lora_a"].dtype == grads["lora_b"].dtype == adapter


def autocast_case(x_dtype, weight_dtype):
    inputs, basis = make_inputs(9)
    inputs["x"] = inputs["x"].to(x_dtype)
    inputs["weight"] = inputs["weight"].to(weight_dtype)
    inputs["bias"] = inputs["bias"].to(weight_dtype)
    return inputs, basis


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_nn_linear(x, weight, autocast):
    """Values, dtypes and gradients, with backward called inside the block."""
    inputs, basis = autocast_case(x, weight)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    with torch.autocast("cpu", dtype=autocast):
        y = nk.nsru_linear(**leaves, basis=basis)
        frozen = torch.nn.functional.linear(leaves["x"], leaves["weight"], leaves["bias"])
        assert y.dtype == frozen.dtype == autocast
        grads = torch.autograd.grad(y.float().square().sum(), list(leaves.values()))
    cast = {
        n: (t.detach().to(autocast) if n in ("x", "weight", "bias") else t.detach())
        for n, t in leaves.items()
    }
    cast_leaves = {n: t.requires_grad_() for n, t in cast.items()}
    expected = nk.nsru_linear(**cast_leaves, basis=basis)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    plain = torch.autograd.grad(expected.float().square().sum(), list(cast_leaves.values()))
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


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_saved_tensors_are_never_written_to(dropout_p):
    inputs, basis = make_inputs()
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    before = {n: t.detach().clone() for n, t in [*leaves.items(), ("basis", basis)]}
    saved = []

    def pack(tensor):
        saved.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = nk.nsru_linear(**leaves, basis=basis, dropout_p=dropout_p)
    dy = torch.randn_like(y)
    dy_before = dy.clone()
    first = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()), dy)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert saved
    for tensor, copy in saved:
        assert torch.equal(tensor, copy)
    for name, tensor in [*leaves.items(), ("basis", basis)]:
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(dy, dy_before)


def test_an_in_place_edit_of_x_before_backward_is_refused_not_miscomputed():
    inputs, basis = make_inputs()
    inputs["lora_a"].requires_grad_()
    y = nk.nsru_linear(**inputs, basis=basis)
    inputs["x"].add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        y.sum().backward()


def test_double_backward_is_refused():
    inputs, basis = make_inputs()
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(
        nk.nsru_linear(**inputs, basis=basis).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        dx.sum().backward()


def test_meta_tensors_give_shapes():
    inputs, basis = make_inputs((2, 3), dtype=torch.bfloat16)
    leaves = {n: t.to("meta").requires_grad_() for n, t in inputs.items()}
    y = nk.nsru_linear(**leaves, basis=basis.bfloat16().to("meta"), dropout_p=0.1)
    assert y.is_meta
    assert y.shape == (2, 3, 20)
    y.sum().backward()
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
