"""Few tokens: each member by itself, by products that autograd records, equal to the usual way."""

import copy
import pickle

import pytest
import torch
from group_models import (
    WIDTHS,
    K,
    R,
    adapted,
    alone,
    assert_same,
    batch,
    gradients,
    make_model,
    step,
)
from test_gradient_projection import checkpointed
from test_grouping import CHANGES

from nsru_kernels import BackendUnavailable
from nsru_kernels.dispatch import plans
from nsru_kernels.ops.linear import few


@pytest.fixture
def served(monkeypatch):
    """One entry for each linear computed this way."""
    taken, linear = [], few.linear

    def counted(x, *args):
        taken.append(x.numel())
        return linear(x, *args)

    monkeypatch.setattr(few, "linear", counted)
    return taken


@pytest.fixture
def few_most(monkeypatch):
    """Sets the limit; the folder's other tests have none."""

    def set_most(entries, device="cpu"):
        monkeypatch.setattr(few, "MOST", {device: entries})

    set_most(1000)
    return set_most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lead", [(5,), (2, 3), (2, 1, 3)])
def test_values_and_gradients_are_those_of_the_usual_way(dtype, lead, few_most, served, groups):
    model, _ = make_model(dtype=dtype)
    x = torch.randn(*lead, 16).to(dtype)
    few_most(0)
    want = gradients(model, x)
    assert groups == [3]
    assert not served
    few_most(1000)
    got = gradients(model, x)
    assert groups == [3]
    assert len(served) == 3
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    assert_same(got, want, **tolerance)
    few_most(x.numel() - 1)
    model(x)
    assert groups == [3, 3], "one token more goes the usual way"


@pytest.mark.gpu
def test_on_a_gpu_where_the_limit_is_raised(few_most, served, groups):
    model, _ = make_model()
    model, x = model.cuda(), batch().cuda()
    want = gradients(model, x)
    assert not served, "by default"
    few_most(1000, "cuda")
    got = gradients(model, x)
    assert len(served) == 3
    assert_same(got, want, rtol=1e-3, atol=1e-3)


def rescale(model, x):
    model[0].k.alpha *= 3


@pytest.mark.parametrize("name", [*CHANGES, "rescale"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_change_is_seen(name, grad, few_most, served):
    model, _ = make_model()
    results = []
    for m in (alone(model), model):
        few_most(0 if results else 1000)
        x = batch()
        with torch.set_grad_enabled(grad):
            m(x)
            (rescale if name == "rescale" else CHANGES[name])(m, x)
            results.append(m(x).detach())
    assert len(served) >= 5
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_micro_batches_and_steps(use_reentrant, few_most, served):
    model = make_model(layers=2)[0].double()
    reference = copy.deepcopy(model)
    found = []
    for m in (model, reference):
        call = m if use_reentrant is None else checkpointed(m, use_reentrant)
        trained = [p for p in m.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=0.1)
        few_most(0 if m is reference else 1000)
        for seed in range(6):
            call(batch(seed=seed).double().requires_grad_()).square().sum().backward()
            if seed % 2:
                optimizer.step()
                optimizer.zero_grad()
        found.append([p.detach() for p in trained])
    assert served
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_variables_last_as_long_as_the_adapters(few_most):
    model, _ = make_model()
    with torch.inference_mode():
        model(batch())
    known = model[0].q.group.projected
    assert [len(variable) for *_, variable in known.variables.values()] == [R] * 3
    kept = [variable for *_, variable in known.variables.values()]
    for seed in range(2):
        gradients(model, batch(seed=seed))
    assert model[0].q.group.projected is known
    assert [variable for *_, variable in known.variables.values()] == kept
    step(model, None)
    model(batch())
    assert model[0].q.group.projected is not known
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(gradients(other, batch()), gradients(model, batch()))


def test_outputs_go_back_one_at_a_time_and_unused_ones_not_at_all(few_most, served):
    model, _ = make_model()
    q, k, v = adapted(model)
    x = batch()
    ys = [m(x) for m in (q, k, v)]
    ys[0].sum().backward()
    assert [p.grad for p in (k.lora_A, k.lora_B)] == [None, None]
    ys[1].sum().backward()
    assert v.lora_A.grad is None
    reference = alone(model)
    reference.zero_grad()
    few_most(0)
    (reference[0].q(x).sum() + reference[0].k(x).sum()).backward()
    for name in ("q", "k"):
        got, want = getattr(model[0], name), getattr(reference[0], name)
        torch.testing.assert_close(got.lora_A.grad, want.lora_A.grad)


def test_a_second_derivative(few_most):
    model = make_model()[0].double()
    layer = model[0].q
    x = batch().double().requires_grad_()

    def penalty(y, a):
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (x, a))

    a_RK = layer.lora_A.detach().clone().requires_grad_()
    projected = a_RK - a_RK @ layer.basis @ layer.basis.T
    plain = x @ layer.weight.T + layer.bias + layer.scaling * x @ projected.T @ layer.lora_B.T
    for got, want in zip(penalty(layer(x), layer.lora_A), penalty(plain, a_RK), strict=True):
        torch.testing.assert_close(got, want)


def test_an_edit_of_a_basis_before_backward_is_refused(few_most, served):
    model, _ = make_model()
    loss = model(batch()).sum()
    assert len(served) == 3
    model[0].q.basis.mul_(0.5)
    with pytest.raises(RuntimeError, match=r"basis .* modified by an inplace operation"):
        loss.backward()


def test_a_kernel_that_was_measured_to_win_serves(few_most, served, monkeypatch):
    asked = []

    def winner(op, device, query, threads):
        asked.append(query.sizes)
        return plans.Winner("cpu", None) if query.sizes[0] == 1 else None

    monkeypatch.setattr(few, "_has_kernels", lambda: True)
    monkeypatch.setattr(few, "measured", winner)
    model, _ = make_model()
    model(batch(1))
    assert not served
    model(batch(2))
    assert len(served) == 3
    assert asked[-3:] == [(2, K, n, R) for n in WIDTHS.values()]


def test_dropout_and_a_named_backend_go_the_usual_way(few_most, served, monkeypatch):
    model, _ = make_model(dropout=0.5)
    model(batch())
    assert not served
    model.eval()(batch())
    assert len(served) == 3
    model, _ = make_model(backend="cuda")
    with pytest.raises(BackendUnavailable):
        model(batch())
    model, _ = make_model()
    model(batch())
    model[0].k.backend = "cuda"
    with pytest.raises(BackendUnavailable):
        model(batch())
    served.clear()
    model, _ = make_model()
    monkeypatch.setenv("NSRU_BACKEND", "cuda")
    with pytest.raises(BackendUnavailable):
        model(batch())
    assert not served
