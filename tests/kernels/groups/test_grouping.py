"""Who is computed together, when each works alone, and what changes between the calls do."""

import pytest
import torch
from group_models import (
    WIDTHS,
    Attention,
    K,
    R,
    alone,
    assert_same,
    batch,
    gradients,
    make_model,
    step,
)
from linear_cases import make_basis
from torch import nn

import nsru_kernels as nk
from nsru_kernels.nn import group as module_under_test


def test_those_that_read_one_tensor_are_computed_together(groups):
    model, report = make_model(layers=2)
    reference = alone(model)
    assert report.groups == [[f"{i}.{name}" for name in WIDTHS] for i in range(2)]
    assert "  q+k+v × 2 computed together" in str(report)
    for _ in range(3):
        assert_same(gradients(model, batch()), gradients(reference, batch()))
    assert groups == [3] * 6
    assert module_under_test._slot.waiting is None, "all were taken"


@pytest.mark.parametrize("order", ["qkv", "kqv", "vkq", "qvk"])
def test_any_member_may_come_first(order, groups):
    model, _ = make_model()
    reference = alone(model)
    model[0].order = reference[0].order = order
    assert_same(gradients(model, batch()), gradients(reference, batch()))
    assert groups == [3]


def test_one_tensor_may_come_again(groups):
    model, _ = make_model()
    x = batch()
    for _ in range(3):
        model(x)
    assert groups == [3, 3, 3]


def test_a_tensor_edited_between_the_calls_is_not_the_same(groups):
    model, _ = make_model()
    reference = alone(model)
    for _ in range(3):
        ys = []
        for m in (model, reference):
            x = batch()
            m[0].between = lambda name, x=x: x.mul_(2) if name == "q" else None
            with torch.no_grad():
                ys.append(m(x))
        torch.testing.assert_close(*ys)
    assert groups == [3, 3, 3]


def test_a_member_called_with_another_tensor_works_alone(groups):
    model, _ = make_model()
    reference = alone(model)
    for i in range(6):
        others = {"v": batch(seed=7)} if i % 2 else {}
        got = gradients(model, batch(), lambda x, o=others: model[0](x, **o))
        want = gradients(reference, batch(), lambda x, o=others: reference[0](x, **o))
        assert_same(got, want)
    assert groups == [3] * 6


def test_members_that_are_no_longer_called(groups):
    model, _ = make_model()
    reference = alone(model)
    for seed in range(5):
        torch.testing.assert_close(model[0].q(batch(seed=seed)), reference[0].q(batch(seed=seed)))
    assert groups == [3] * 5


def test_linears_in_a_chain_are_never_grouped(groups):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(K, K) for _ in range(3)])
    report = nk.swap_linears(model, "all-linear", rank=R, alpha=6, batch={"input": batch()})
    for _ in range(3):
        model(batch())
    assert not groups
    assert report.groups == []


def test_without_a_look_each_works_alone_and_the_report_says_so(groups):
    model, report = make_model(batch=None)
    model(batch())
    assert not groups
    assert "each computed alone: pass subspaces of estimate_retain_subspaces" in str(report)
    assert "computed alone" not in str(make_model(siblings=False)[1])


def test_subspaces_carry_the_groups(groups):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Attention())
    batches = [{"input": batch(64, seed=i)} for i in range(2)]
    subspaces = nk.estimate_retain_subspaces(
        model, batches, list(WIDTHS), width=8, rank=3, progress=False
    )
    report = nk.swap_linears(model, list(WIDTHS), rank=R, alpha=6, subspaces=subspaces)
    assert report.groups == [[f"{i}.{name}" for name in WIDTHS] for i in range(2)]
    model(batch())
    assert groups == [3, 3]


def test_one_tensor_read_in_all_layers_makes_a_group_in_each():
    """As cross-attention reads the encoder's output."""

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(K, K) for n in "qkv"})
                                        for _ in range(2))  # fmt: skip

        def forward(self, h, memory):
            for layer in self.layers:
                h = layer["q"](h) + layer["k"](memory) * layer["v"](memory)
            return h

    report = nk.swap_linears(
        Cross(), "all-linear", rank=R, alpha=6, batch={"h": batch(), "memory": batch(seed=2)}
    )
    assert report.groups == [[f"layers.{i}.{n}" for n in "kv"] for i in range(2)]


def test_a_group_shares_its_basis():
    torch.manual_seed(0)
    model = nn.Sequential(Attention())
    subspaces = {f"0.{n}": make_basis(K, 5).float() for n in WIDTHS}
    swap = {"rank": R, "alpha": 6, "batch": {"input": batch()}}
    assert nk.swap_linears(model, list(WIDTHS), subspaces=subspaces, **swap).groups == []


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
    model[0].q.subspace.basis.copy_(make_basis(K, 5, seed=5))


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
    model, _ = make_model()
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
    model, _ = make_model()
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
    model, _ = make_model()
    model[0].q(x)
    x.requires_grad_()
    model[0].k(x).sum().backward()
    assert x.grad is not None
