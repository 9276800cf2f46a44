"""Siblings: who is served together, when each works alone, and that results never depend on it."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from linear_cases import make_basis
from torch import nn
from torch.utils.checkpoint import checkpoint

import nsru_kernels as nk
from nsru_kernels.nn import siblings as module_under_test

K, R = 16, 3
WIDTHS = {"q": 12, "k": 8, "v": 8}


def nothing(name):
    pass


class Attention(nn.Module):
    """q, k and v as a layer calls them; ``order`` and the inputs can be changed by a test."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, n).to(dtype) for n in WIDTHS.values())
        self.o = nn.Linear(28, K).to(dtype)
        self.order = "qkv"
        self.between = nothing

    def forward(self, x, **others):
        ys = []
        for name in self.order:
            ys.append(getattr(self, name)(others.get(name, x)))
            self.between(name)
        return self.o(torch.cat(ys, -1)).tanh()


def make_model(seed=0, dtype=torch.float32, layers=1, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(*[Attention(dtype) for _ in range(layers)])
    shared = [make_basis(K, 5, i).float() for i in range(layers)]
    subspaces = {f"{i}.{name}": shared[i] for i in range(layers) for name in WIDTHS}
    report = nk.swap_linears(model, list(WIDTHS), rank=R, alpha=6, subspaces=subspaces, **options)
    for module in adapted(model):
        nn.init.normal_(module.lora_B)
    return model, report


def adapted(model):
    return [m for m in model.modules() if isinstance(m, nk.NSRULinear)]


def alone(model):
    """A copy of which no module knows another."""
    other = copy.deepcopy(model)
    for module in adapted(other):
        module._siblings = None
    return other


def batch(m=5, seed=1):
    return torch.randn(m, K, generator=torch.Generator().manual_seed(seed))


def gradients(model, x, call=None):
    """y, dX and the gradient of every adapter."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = (call or model)(leaf)
    y.square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": leaf.grad, **found}


def assert_same(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, n=name: f"{n}: {m}",
                                   **tolerance)  # fmt: skip


def taught(**options):
    """A model that has seen two forwards, and its report."""
    model, report = make_model(**options)
    for _ in range(2):
        model(batch().to(model[0].q.weight.dtype))
    assert "q+k+v × 1 served together\n" in str(report) + "\n"
    return model, report


@pytest.fixture
def groups(monkeypatch):
    """How many linears each call of the group op took."""
    sizes = []
    run = module_under_test.projected_linear_group

    def counted(x, weights, *args):
        sizes.append(len(weights))
        return run(x, weights, *args)

    monkeypatch.setattr(module_under_test, "projected_linear_group", counted)
    return sizes


@pytest.fixture(autouse=True)
def nothing_is_left():
    module_under_test._slot.pending = None
    yield
    pending = module_under_test._slot.pending
    assert pending is None or not pending.outputs or pending.x() is not None


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


def step(model, x):
    for p in (model[0].k.lora_A, model[0].k.lora_B):
        p.grad = torch.ones_like(p)
    torch.optim.SGD([model[0].k.lora_A, model[0].k.lora_B], lr=0.1).step()


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


def test_what_a_backward_has_freed_is_not_handed_out():
    model, _ = taught()
    x = batch().requires_grad_()
    model[0].q(x).sum().backward()
    x.grad = None
    model[0].k(x).sum().backward()
    reference = alone(model)
    want = batch().requires_grad_()
    reference[0].k(want).sum().backward()
    torch.testing.assert_close(x.grad, want.grad)


@pytest.mark.parametrize("grad", [True, False])
def test_outputs_that_nobody_fetches_die_with_x(grad):
    model, _ = taught()
    x = batch()
    with torch.set_grad_enabled(grad):
        model[0].q(x)
        pending = module_under_test._slot.pending
        waiting = [weakref.ref(y) for y, *_ in pending.outputs.values()]
        assert len(waiting) == 2
        del x
        if grad:  # the graph holds x until the next group, of whatever model, is computed
            other, _ = taught(seed=1)
            other[0].q(batch())
        else:
            assert not pending.outputs
        del pending
    assert [y() for y in waiting] == [None, None]


def test_an_exception_between_the_calls_changes_nothing(groups):
    model, report = taught()
    want = gradients(alone(model), batch())

    def fail(name):
        raise KeyError(name)

    model[0].between = fail
    with pytest.raises(KeyError):
        model(batch(seed=3))
    model[0].between = nothing
    for _ in range(3):
        assert_same(gradients(model, batch()), want)
    assert "q+k+v × 1 served together" in str(report), "one exception is forgiven"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant, dtype, groups):
    """From the first forward on: what a recomputation saves must be what the forward saved."""
    model, report = make_model(layers=2, dtype=dtype)
    x = batch().to(dtype)
    want = gradients(alone(model), x)

    def checkpointed(h):
        for layer in model:
            h = checkpoint(layer, h, use_reentrant=use_reentrant)
        return h

    tolerance = {} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 0.2}
    for _ in range(3):
        assert_same(gradients(model, x, checkpointed), want, **tolerance)
    assert groups == [3] * 8, "two layers, forward and recomputation, but for the first forward"
    assert "q+k+v × 2 served together" in str(report)


@pytest.mark.parametrize("layer_by_layer", [True, False])
def test_checkpoints_of_overlapping_forwards(layer_by_layer, groups):
    """A forward that was watched is recomputed after a later one: both work alone."""
    model, _ = make_model()
    parts = [model[0].q, model[0].k, model[0].v] if layer_by_layer else [model]

    def loss(x):
        ys = [checkpoint(part, x, use_reentrant=False) for part in parts]
        return sum(y.square().sum() for y in ys)

    def grads(model):
        return [p.grad for p in model.parameters() if p.requires_grad]

    reference = alone(model)
    alone_parts = (
        [reference[0].q, reference[0].k, reference[0].v] if layer_by_layer else [reference]
    )
    for seed in range(4):
        first, second = batch(seed=seed), batch(seed=10 + seed)
        losses = [loss(first), loss(second)]
        for one in losses:
            one.backward()
        for x in (first, second):
            sum(part(x).square().sum() for part in alone_parts).backward()
        for got, want in zip(grads(model), grads(reference), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3)
    assert groups


def test_checkpoints_of_single_members():
    """Reentrant ones recompute each with another x: no reason to end the group."""
    model, report = taught()
    reference = alone(model)

    def call(model, use_reentrant):
        def forward(x):
            members = (model[0].q, model[0].k, model[0].v)
            return torch.cat([checkpoint(m, x, use_reentrant=use_reentrant) for m in members], -1)

        return forward

    for use_reentrant in (True, True, False, True):
        got = gradients(model, batch(), call(model, use_reentrant))
        want = gradients(reference, batch(), call(reference, use_reentrant))
        assert_same(got, want, rtol=1e-5, atol=1e-4)
    assert "q+k+v × 1 served together" in str(report)


def test_a_recomputation_that_stops_early_is_no_miss():
    model, report = taught()
    reference = alone(model)

    def call(model):
        def forward(x):
            q = model[0].q(x).sin()  # the last that is saved; k and v are linear from here on
            return torch.cat([q, model[0].k(x), model[0].v(x)], -1)

        return lambda x: checkpoint(forward, x, use_reentrant=False)

    for _ in range(4):
        got = gradients(model, batch(), call(model))
        assert_same(got, gradients(reference, batch(), call(reference)))
    assert "q+k+v × 1 served together" in str(report)


def test_a_group_that_ends_between_forward_and_recomputation():
    model, report = taught()
    want = gradients(alone(model), batch())

    def call(x):
        y = checkpoint(model, x, use_reentrant=False)
        with torch.no_grad():
            model[0](batch(seed=4), v=batch(seed=5))
            model[0](batch(seed=4), v=batch(seed=5))
        return y

    assert_same(gradients(model, batch(), call), want)
    assert "v × 1 worked alone" in str(report)


def test_outputs_that_the_loss_does_not_use():
    model, _ = taught()
    reference = alone(model)
    for m in (model, reference):
        m[0].q(batch())
    for m in (model, reference):
        x = batch()
        q, _, v = m[0].q(x), m[0].k(x), m[0].v(x)
        (q.sum() + v.square().sum()).backward()
        assert m[0].k.lora_B.grad is None or not m[0].k.lora_B.grad.any()
    for name in ("q", "v"):
        torch.testing.assert_close(
            getattr(model[0], name).lora_A.grad, getattr(reference[0], name).lora_A.grad
        )


def test_threads_do_not_take_each_others_outputs(groups):
    model, _ = taught()
    reference = alone(model)
    barrier = threading.Barrier(2)
    model[0].between = lambda name: barrier.wait(timeout=30)
    results = {}

    def work(seed):
        for _ in range(5):
            results[seed] = model(batch(seed=seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (2, 3):
        torch.testing.assert_close(results[seed], reference(batch(seed=seed)))
    assert groups.count(3) >= 10


def test_replicas_work_alone(groups):
    """Those of DataParallel live for one forward and share the handle of their originals."""
    model, _ = taught()
    groups.clear()
    reference, x = alone(model), batch()
    for _ in range(3):
        for name in WIDTHS:
            original = getattr(model[0], name)
            replica = original._replicate_for_data_parallel()
            for tensor in ("weight", "bias", "lora_A", "lora_B"):
                setattr(replica, tensor, getattr(original, tensor))
            torch.testing.assert_close(replica(x), getattr(reference[0], name)(x))
    assert not groups
    assert not model[0].q._siblings._called - {weakref.ref(m) for m in adapted(model)}


def save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, save_and_load])
def test_copies_learn_for_themselves(copied, groups):
    model, report = taught()
    x = batch()
    model[0].q(x)  # with outputs pending
    before = model.state_dict().keys()
    other = copied(model)
    assert other.state_dict().keys() == before == make_model()[0].state_dict().keys()
    handle = other[0].q._siblings
    assert handle is other[0].k._siblings
    assert handle is not model[0].q._siblings
    assert sorted(handle._names.values()) == ["k", "q", "v"]
    groups.clear()
    other(batch())
    assert not groups
    torch.testing.assert_close(other(batch()), alone(model)(batch()))
    assert groups == [3]
    assert len(pickle.dumps(model[0].q._siblings)) < 200, "no tensor travels with the handle"
    del x
    assert "q+k+v" in str(report)


def test_adapters_disabled_and_merging(groups):
    model, report = taught()
    reference = alone(model)
    with nk.adapters_disabled(model), nk.adapters_disabled(reference):
        torch.testing.assert_close(model(batch()), reference(batch()), rtol=0, atol=0)
        assert "q+k+v × 1 worked alone: adapters are off or merged" in str(report)
    model[0].k.merge()
    torch.testing.assert_close(model(batch()), reference(batch()), rtol=1e-4, atol=1e-4)
    model[0].k.unmerge()
    groups.clear()
    torch.testing.assert_close(model(batch()), reference(batch()))
    assert groups == [3]
    assert "q+k+v × 1 served together" in str(report)
    nk.merge_adapters(model)
    torch.testing.assert_close(model(batch()), reference(batch()), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, nk.NSRULinear) for m in model.modules())


def test_a_member_that_is_replaced(groups):
    model, _ = taught()
    model[0].v = nn.Linear(K, WIDTHS["v"])
    gc.collect()
    reference = alone(model)
    for _ in range(4):
        torch.testing.assert_close(model(batch()), reference(batch()))


def test_dropout_works_alone_in_training_only(groups):
    model, report = make_model(dropout=0.5)
    for _ in range(3):
        model(batch())
    assert not groups
    assert "q+k+v × 1 worked alone: dropout draws a mask for each" in str(report)
    model.eval()
    torch.testing.assert_close(model(batch()), alone(model)(batch()))
    assert groups == [3]


def test_hooks_of_members_still_run(groups):
    model, _ = taught()
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
    model, _ = taught()
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
    model, report = taught()
    want = alone(model)[0].q(batch())
    make, reason = OBSTACLES[case]
    make(model)
    groups.clear()
    torch.testing.assert_close(model[0].q(batch()), want)
    assert not groups
    assert f"q+k+v × 1 worked alone: {reason}" in str(report)


def test_inference_mode_works_alone_on_what_cannot_be_watched(groups):
    model, _ = taught()
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


def test_stacked_folds_are_kept_until_a_fold_changes(monkeypatch):
    model, _ = taught()
    handle = model[0].q._siblings
    model(batch())
    (kept,) = [stacked for _, stacked in handle._stacks.values()]
    assert kept.shape == (3 * R, K)
    model(batch())
    assert next(iter(handle._stacks.values()))[1] is kept
    step(model, None)
    torch.testing.assert_close(model(batch()), alone(model)(batch()))
    assert next(iter(handle._stacks.values()))[1] is not kept
    assert len(handle._stacks) == 1


def test_without_cached_folds_the_group_folds_itself(monkeypatch):
    """As while a CUDA graph is captured."""
    model, _ = taught()
    want = gradients(alone(model), batch())
    monkeypatch.setattr(type(model[0].q._folds), "folded", lambda *args: None)
    assert_same(gradients(model, batch()), want)


def test_autocast(groups):
    model, _ = taught()
    groups.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = gradients(model, batch()), gradients(alone(model), batch())
    assert groups == [3]
    assert_same(got, want, rtol=5e-2, atol=5e-2)


def test_compiled_models_work_alone_in_one_graph(groups):
    torch._dynamo.reset()
    model, _ = taught()
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
def test_llama_finds_its_siblings(use_reentrant, groups):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    report = nk.swap_linears(model, "all-linear", rank=R, alpha=6)
    for module in adapted(model):
        nn.init.normal_(module.lora_B, std=0.1)
    reference = alone(model)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        reference.enable_input_require_grads()
    ids = torch.randint(40, (2, 7))
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
    assert "  q_proj+k_proj+v_proj × 2 served together" in lines
    assert "  gate_proj+up_proj × 2 served together" in lines
    assert set(groups) == {2, 3}
    assert len(groups) >= (8 if use_reentrant is None else 16)


@pytest.mark.parametrize("change", ["detached in place", "given other data"])
def test_a_tensor_that_became_another_is_not_the_same(change):
    model, _ = taught()
    block = model[0]
    w = torch.randn(5, K, requires_grad=True)
    x = w * 2 if change == "detached in place" else batch()
    block.q(x)
    if change == "detached in place":
        x.detach_().requires_grad_()
    else:
        x.data = batch(3, seed=7)
    y = block.k(x)
    torch.testing.assert_close(y, block.k.forward_alone(x))
    if change == "detached in place":
        y.sum().backward()
        assert x.grad is not None
        assert w.grad is None


def test_going_back_one_output_at_a_time_says_what_to_do():
    model, _ = taught()
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
    assert "served together" not in str(report)
