"""Groups that are copied, replaced, sharded, compiled and trained."""

import copy
import gc
import io
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
from torch import nn

import nsru_kernels as nk
from nsru_kernels.nn import group as module_under_test
from nsru_kernels.nn import projections


def save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, save_and_load])
def test_copies_have_groups_of_their_own(copied, groups):
    model, _ = make_model()
    x = batch()
    model[0].q(x)  # with outputs pending
    before = model.state_dict().keys()
    other = copied(model)
    assert other.state_dict().keys() == before == make_model()[0].state_dict().keys()
    group = other[0].q.group
    assert group is other[0].k.group
    assert group is not model[0].q.group
    assert group.modules() == [other[0].q, other[0].k, other[0].v]
    groups.clear()
    torch.testing.assert_close(other(batch()), alone(model)(batch()))
    assert groups == [3]
    assert len(pickle.dumps(model[0].q.group)) < 200, "no tensor travels with the group"
    del x


def test_adapters_disabled_and_merging(groups):
    model, _ = make_model()
    reference = alone(model)
    with nk.adapters_disabled(model), nk.adapters_disabled(reference):
        torch.testing.assert_close(model(batch()), reference(batch()), rtol=0, atol=0)
    model[0].k.merge()
    torch.testing.assert_close(model(batch()), reference(batch()), rtol=1e-4, atol=1e-4)
    assert model[0].q.group.obstacle == "adapters are off or merged"
    model[0].k.unmerge()
    groups.clear()
    torch.testing.assert_close(model(batch()), reference(batch()))
    assert groups == [3]
    nk.merge_adapters(model)
    torch.testing.assert_close(model(batch()), reference(batch()), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, nk.NSRULinear) for m in model.modules())


def test_a_member_that_is_replaced(groups):
    model, _ = make_model()
    model[0].v = nn.Linear(K, WIDTHS["v"])
    gc.collect()
    reference = alone(model)
    for _ in range(4):
        torch.testing.assert_close(model(batch()), reference(batch()))


def test_dropout_works_alone_in_training_only(groups):
    model, _ = make_model(dropout=0.5)
    for _ in range(3):
        model(batch())
    assert not groups
    assert model[0].q.group.obstacle == "dropout draws a mask for each"
    model.eval()
    torch.testing.assert_close(model(batch()), alone(model)(batch()))
    assert groups == [3]


def test_dropout_projects_once_for_all(monkeypatch):
    model, _ = make_model(dropout=0.5)
    calls, project = [], projections.project_groups
    monkeypatch.setattr(
        projections, "project_groups", lambda *args: calls.append(1) or project(*args)
    )
    for _ in range(3):
        torch.manual_seed(0)
        y = model(batch())
    assert len(calls) == 1
    torch.manual_seed(0)
    torch.testing.assert_close(y, alone(model)(batch()))


def test_hooks_of_members_still_run(groups):
    model, _ = make_model()
    seen = []
    for name in WIDTHS:
        getattr(model[0], name).register_forward_hook(
            lambda module, args, y, name=name: seen.append((name, y.shape[-1]))
        )
    model[0].k.register_forward_hook(lambda module, args, y: y * 2)
    groups.clear()
    torch.testing.assert_close(model(batch()), alone(model)(batch()))
    assert seen[:3] == list(WIDTHS.items())
    assert groups == [3]


def test_a_pre_hook_that_replaces_x_is_obeyed():
    model, _ = make_model()
    model[0].k.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    reference = alone(model)
    for _ in range(4):
        torch.testing.assert_close(model(batch()), reference(batch()))


class DTensor(torch.Tensor):
    pass


def shard(model):
    weight = model[0].k.weight
    model[0].k.weight = nn.Parameter(weight.data.as_subclass(DTensor), requires_grad=False)


OBSTACLES = {
    "sharded": (shard, "weights are sharded"),
    "not gathered": (
        lambda m: setattr(m[0].k.lora_A, "data", torch.empty(0)),
        "weights are sharded",
    ),
    "on meta": (lambda m: m[0].k.to("meta"), "on different devices"),
    "bf16": (lambda m: m[0].k.bfloat16(), "weights of different dtypes"),
    "backend": (lambda m: setattr(m[0].k, "backend", "eager"), "different bases or backends"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_a_member_that_cannot_join_leaves_the_others_alone(case, groups):
    model, _ = make_model()
    want = alone(model)[0].q(batch())
    make, reason = OBSTACLES[case]
    make(model)
    groups.clear()
    torch.testing.assert_close(model[0].q(batch()), want)
    assert not groups
    assert model[0].q.group.obstacle == reason


def test_inference_mode_works_alone_on_what_cannot_be_watched(groups):
    model, _ = make_model()
    reference = alone(model)
    groups.clear()
    with torch.inference_mode():
        x = batch()
        model[0].q(x)
        x.mul_(2)
        torch.testing.assert_close(model[0].k(x), reference[0].k(x))
    assert not groups
    assert_same(gradients(model, batch()), gradients(reference, batch()))
    assert groups == [3]


def test_the_projection_is_kept_until_an_adapter_changes():
    model, _ = make_model()
    group = model[0].q.group
    model(batch())
    kept = group.projected.value
    assert kept.shape == (3 * R, K)
    model(batch())
    assert group.projected.value is kept
    step(model, None)
    torch.testing.assert_close(model(batch()), alone(model)(batch()))
    assert group.projected.value is not kept


def test_a_recorded_graph_projects_by_itself(monkeypatch):
    """As while a CUDA graph is captured."""
    model, _ = make_model()
    want = gradients(alone(model), batch())
    run = module_under_test.projected_linears

    def without(*args):
        return run(*args[:6], None, *args[7:])

    monkeypatch.setattr(module_under_test, "projected_linears", without)
    assert_same(gradients(model, batch()), want)


def test_autocast(groups):
    model, _ = make_model()
    groups.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = gradients(model, batch()), gradients(alone(model), batch())
    assert groups == [3]
    assert_same(got, want, rtol=5e-2, atol=5e-2)


def test_compiled_models_work_alone_in_one_graph(groups):
    torch._dynamo.reset()
    model, _ = make_model()
    groups.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(gradients(model, batch(), compiled), gradients(alone(model), batch()))
    assert not groups


def test_training_follows_separate_modules():
    model, _ = make_model(layers=2)
    reference = alone(model)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05)
        for m in (model, reference)
    ]
    for seed in range(6):
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            gradients(m, batch(seed=seed))
            optimizer.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_llama_is_grouped(use_reentrant, groups):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(40, (2, 7))
    report = nk.swap_linears(model, "all-linear", rank=R, alpha=6, batch={"input_ids": ids})
    for module in adapted(model):
        nn.init.normal_(module.lora_B, std=0.1)
    reference = alone(model)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        reference.enable_input_require_grads()
    for m in (model, reference):
        m.train()
    for _ in range(3):
        for m in (model, reference):
            m.zero_grad()
            m(input_ids=ids, labels=ids).loss.backward()
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(p.grad, q.grad, msg=lambda m, n=name: f"{n}: {m}")
    lines = str(report).splitlines()
    assert "  q_proj+k_proj+v_proj × 2 computed together" in lines
    assert "  gate_proj+up_proj × 2 computed together" in lines
    assert set(groups) == {2, 3}
    assert len(groups) == (12 if use_reentrant is None else 24)


@pytest.mark.parametrize("change", ["detached in place", "given other data"])
def test_a_tensor_that_became_another_is_not_the_same(change):
    model, _ = make_model()
    block = model[0]
    w = torch.randn(5, K, requires_grad=True)
    x = w * 2 if change == "detached in place" else batch()
    block.q(x)
    if change == "detached in place":
        x.detach_().requires_grad_()
    else:
        x.data = batch(3, seed=7)
    y = block.k(x)
    torch.testing.assert_close(y, alone(model)[0].k(x))
    if change == "detached in place":
        y.sum().backward()
        assert x.grad is not None
        assert w.grad is None


def test_going_back_one_output_at_a_time_says_what_to_do():
    model, _ = make_model()
    x = batch()
    q, k = model[0].q(x), model[0].k(x)
    q.sum().backward()
    with pytest.raises(RuntimeError, match=r"share one backward.*siblings=False"):
        k.sum().backward()
    model, report = make_model(siblings=False)
    for _ in range(3):
        q, k = model[0].q(x), model[0].k(x)
        q.sum().backward()
        k.sum().backward()
    assert report.groups == []
