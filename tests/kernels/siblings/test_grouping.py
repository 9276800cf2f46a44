"""Who is served together, when each works alone, and what changes between the calls do."""

import pytest
import torch
from linear_cases import make_basis
from sibling_models import (
    WIDTHS,
    Attention,
    K,
    R,
    adapted,
    alone,
    assert_same,
    batch,
    gradients,
    make_model,
    step,
    taught,
)
from torch import nn

import nsru_kernels as nk
from nsru_kernels.nn import siblings as module_under_test


def test_a_first_forward_is_watched_and_the_next_is_served_together(groups):
    model, report = make_model()
    reference = alone(model)
    assert "  q+k+v × 1 candidates to be served together" in str(report)
    want = gradients(reference, batch())
    assert_same(gradients(model, batch()), want, rtol=0, atol=0)
    assert not groups
    assert "q+k+v × 1 read the same tensor, served together from the next forward" in str(report)
    for _ in range(3):
        assert_same(gradients(model, batch()), want)
    assert groups == [3, 3, 3]
    assert "  q+k+v × 1 served together" in str(report)
    assert not module_under_test._slot.pending.outputs, "all were picked up"


@pytest.mark.parametrize("order", ["kqv", "vkq", "qvk"])
def test_the_order_of_calls_may_change_later(order, groups):
    model, _ = taught()
    reference = alone(model)
    model[0].order = reference[0].order = order
    groups.clear()
    assert_same(gradients(model, batch()), gradients(reference, batch()))
    assert groups == [3]


def test_only_those_called_with_one_tensor_are_grouped(groups):
    model, report = make_model()
    reference = alone(model)
    other = batch(seed=7)
    for i in range(3):
        got = gradients(model, batch(seed=i), lambda x: model[0](x, q=other))
        want = gradients(reference, batch(seed=i), lambda x: reference[0](x, q=other))
        assert_same(got, want)
    assert groups == [2, 2]
    assert "k+v × 1 served together" in str(report)
    assert "q × 1 worked alone: called with different tensors" in str(report)


def test_one_tensor_may_come_again(groups):
    model, _ = make_model()
    x = batch()
    for _ in range(3):
        model(x)
    assert groups == [3, 3]


def test_a_tensor_edited_between_the_calls_is_not_the_same(groups):
    model, report = make_model()
    reference = alone(model)
    for _ in range(3):
        ys = []
        for m in (model, reference):
            x = batch()
            m[0].between = lambda name, x=x: x.mul_(2) if name == "q" else None
            with torch.no_grad():
                ys.append(m(x))
        torch.testing.assert_close(*ys)
    assert groups == [2, 2]
    assert "k+v × 1 served together" in str(report)


def test_members_that_stay_away_end_the_group(groups):
    model, report = taught()
    reference = alone(model)
    other = batch(seed=7)
    groups.clear()
    for _ in range(6):
        y = model[0](batch(), v=other)
        torch.testing.assert_close(y, reference[0](batch(), v=other))
    assert groups[0] == 3, "expected as before"
    assert groups[1:] == [2] * (len(groups) - 1), "then q and k alone"
    assert len(groups) >= 4
    assert "q+k × 1 served together" in str(report)
    assert "v × 1 worked alone: called with different tensors" in str(report)


def test_a_member_that_comes_and_goes_is_given_up(groups):
    model, report = taught()
    groups.clear()
    for i in range(20):
        model[0](batch(), **({"v": batch(seed=7)} if i % 2 else {}))
    assert groups.count(3) <= 6
    assert groups[-4:] == [2] * 4
    assert "v × 1 worked alone: called with different tensors" in str(report)


def test_members_that_are_no_longer_called_end_the_group(groups):
    model, report = taught()
    groups.clear()
    for seed in range(5):
        model[0].q(batch(seed=seed))
    assert groups == [3]
    assert "q+k+v × 1 worked alone: called with different tensors" in str(report)


def test_linears_in_a_chain_are_never_grouped(groups):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(K, K) for _ in range(3)])
    report = nk.swap_linears(model, "all-linear", rank=R, alpha=6)
    for _ in range(3):
        model(batch())
    assert not groups
    assert "0+1+2 × 1 worked alone: called with different tensors" in str(report)


def test_candidates_share_parent_width_and_basis():
    model, report = make_model(layers=2)
    assert [list(h._names.values()) for h in report.siblings] == [["q", "k", "v"]] * 2
    assert len({id(m._siblings) for m in adapted(model)}) == 2
    torch.manual_seed(0)
    other = nn.Sequential(Attention())
    subspaces = {f"0.{n}": make_basis(K, 5).float() for n in WIDTHS}
    assert nk.swap_linears(other, list(WIDTHS), rank=R, alpha=6, subspaces=subspaces).siblings == []


def edit(name):
    @torch.no_grad()
    def change(model, x):
        getattr(model[0].k, name).mul_(2)

    return change


class DataWriter(torch.optim.Optimizer):
    """An optimizer that bumps no version counter."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data.mul_(2)


def step_through_data(model, x):
    DataWriter([model[0].k.lora_B], {}).step()


def replace_b(model, x):
    model[0].k.lora_B = nn.Parameter(model[0].k.lora_B.detach() * 2)


def rebind_b(model, x):
    model[0].k.lora_B.data = model[0].k.lora_B.data * 2


@torch.no_grad()
def edit_basis(model, x):
    model[0].q.retain.basis.copy_(make_basis(K, 5, seed=5))


def edit_x(model, x):
    x.mul_(2)


def disable(model, x):
    model[0].k.enabled = False


def drop_out(model, x):
    model[0].k.dropout = 1.0


CHANGES = {
    **{name: edit(name) for name in ("lora_A", "lora_B", "weight", "bias")},
    **{
        f.__name__: f
        for f in (
            step,
            step_through_data,
            replace_b,
            rebind_b,
            edit_basis,
            edit_x,
            disable,
            drop_out,
        )
    },
    "merge": lambda model, x: model[0].k.merge(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_the_calls_is_seen(name, groups):
    model, _ = taught()
    reference = alone(model)
    results = []
    with torch.no_grad():
        before = reference[0].k(batch())
    for m in (reference, model):
        x = batch()
        groups.clear()
        with torch.no_grad():
            m[0].q(x)
            CHANGES[name](m, x)
            results.append((m[0].k(x), m[0].v(x)))
        changed = (results[-1][0] - before).abs().max() > 1e-3
        assert changed or name == "merge", "the change matters"
    assert groups[0] == 3
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want)


def test_modes_between_the_calls_are_seen():
    model, _ = taught()
    x = batch()
    with torch.no_grad():
        model[0].q(x)
    assert model[0].k(x).requires_grad, "not the output computed without gradients"
    model[0].q(x)
    with torch.no_grad():
        assert not model[0].k(x).requires_grad
    model[0].q(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model[0].k(x).dtype == torch.bfloat16
    model, _ = taught()
    model[0].q(x)
    x.requires_grad_()
    model[0].k(x).sum().backward()
    assert x.grad is not None
