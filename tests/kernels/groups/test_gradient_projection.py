"""Gradients of projected adapters: one projection for each group, whatever a backward brings."""

import functools

import pytest
import torch
from group_models import adapted, alone, assert_same, batch, gradients, make_model
from torch.utils.checkpoint import checkpoint

from nsru_kernels.ops.linear import autograd as linear_autograd

LAYERS = 3
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def projected(monkeypatch):
    """One entry for each projection of a gradient: its rows."""
    taken, one = [], linear_autograd.project_one

    def counted(a_RK, *args):
        taken.append(len(a_RK))
        return one(a_RK, *args)

    monkeypatch.setattr(linear_autograd, "project_one", counted)
    return taken


def make(**options):
    model, _ = make_model(layers=LAYERS, **options)
    return model.double()


def x64():
    return batch().double()


def checkpointed(model, use_reentrant):
    def call(h):
        for layer in model:
            h = checkpoint(layer, h, use_reentrant=use_reentrant)
        return h

    return call


@pytest.mark.parametrize(
    "ways",
    [
        lambda model: model,
        functools.partial(checkpointed, use_reentrant=False),
        functools.partial(checkpointed, use_reentrant=True),
    ],
    ids=["plain", "checkpoint", "reentrant checkpoint"],
)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_of_several_micro_batches_and_steps(ways, dropout):
    model = make(dropout=dropout)
    reference = alone(model)
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (model, reference)]
    optimizers = [torch.optim.SGD(parameters, lr=0.1) for parameters in trained]
    for _ in range(2):
        for _ in range(2):
            torch.manual_seed(2)
            want = gradients(reference, x64(), ways(reference))
            torch.manual_seed(2)
            assert_same(gradients(model, x64(), ways(model)), want, **TOLERANCE)
        for optimizer in optimizers:
            optimizer.step()


def test_one_projection_for_each_group(projected):
    model = make()
    model(x64())
    projected.clear()
    got = gradients(model, x64())
    ranks = sum(m.rank for m in adapted(model[0]))
    assert projected == [ranks] * LAYERS
    assert_same(got, gradients(alone(model), x64()), **TOLERANCE)


def test_gradients_add_up():
    model = make()
    want = {n: 3 * g for n, g in gradients(alone(model), x64()).items()}
    gradients(model, x64())
    for _ in range(2):
        model(x64()).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, want[name], **TOLERANCE)


def test_a_backward_projects_what_it_brings_and_leaves_the_rest(projected):
    model = make()
    want = gradients(alone(model)[0], x64())
    model(x64())
    projected.clear()
    assert_same(gradients(model[0], x64()), want, **TOLERANCE)
    assert len(projected) == 1
    assert all(m.lora_A.grad is None for layer in model[1:] for m in adapted(layer))


def test_gradients_of_some_adapters_run_and_free_what_they_need_alone(projected):
    """A backward to the adapters of the last layer does not go through the first ones."""
    model = make()
    h = model[:2](x64())
    y = model[2](h)
    projected.clear()
    wanted = [model[2].q.lora_A, model[2].v.lora_A]
    got = torch.autograd.grad(y.sum(), wanted)
    assert len(projected) == 1
    h.sum().backward()  # would be a second time
    other = alone(model)
    want = torch.autograd.grad(other(x64()).sum(), [other[2].q.lora_A, other[2].v.lora_A])
    torch.testing.assert_close(got, want, **TOLERANCE)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(model[1](x64()).sum(), [model[0].q.lora_A])


def test_adapters_frozen_and_thawed_between_steps():
    model = make()
    model(x64())
    frozen = [model[0].k, *adapted(model[1])]
    for grad in (False, True):
        for module in frozen:
            module.lora_A.requires_grad_(grad)
        got = gradients(model, x64())
        assert_same(got, gradients(alone(model), x64()), **TOLERANCE)
        assert ("0.k.lora_A" in got) == grad


def test_hooks_of_an_adapter_see_gradients_only():
    """Not None where a backward does not reach it."""
    model, seen = make(), []
    model[2].q.lora_A.register_hook(lambda grad: seen.append(grad.sum()))
    model(x64()).sum().backward()
    assert len(seen) == 1
    model[0](x64()).sum().backward()
    assert len(seen) == 1


def test_an_edit_of_a_basis_before_backward_is_refused():
    model = make()
    loss = model(x64()).sum()
    model[1].q.basis.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
