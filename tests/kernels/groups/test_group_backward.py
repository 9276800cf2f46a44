"""Groups go back: what is freed, checkpoints, threads, replicas."""

import gc
import threading
import weakref

import pytest
import torch
from group_models import (
    WIDTHS,
    K,
    adapted,
    alone,
    assert_same,
    batch,
    gradients,
    make_model,
    nothing,
)
from torch.utils.checkpoint import checkpoint

from nsru_kernels.nn import group as module_under_test


def test_what_a_backward_has_freed_is_not_handed_out():
    model, _ = make_model()
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
    model, _ = make_model()
    x = batch()
    with torch.set_grad_enabled(grad):
        model[0].q(x)
        pending = module_under_test._slot.waiting
        waiting = [weakref.ref(y) for y, *_ in pending.outputs.values()]
        assert len(waiting) == 2
        del x
        if grad:  # the graph holds x until the next group, of whatever model, is computed
            other, _ = make_model(seed=1)
            other[0].q(batch())
        else:
            assert not pending.outputs
        del pending
    assert [y() for y in waiting] == [None, None]


def test_an_exception_between_the_calls_changes_nothing(groups):
    model, _ = make_model()
    want = gradients(alone(model), batch())

    def fail(name):
        raise KeyError(name)

    model[0].between = fail
    with pytest.raises(KeyError):
        model(batch(seed=3))
    model[0].between = nothing
    for _ in range(3):
        assert_same(gradients(model, batch()), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant, dtype, groups):
    """From the first forward on: what a recomputation saves must be what the forward saved."""
    model, _ = make_model(layers=2, dtype=dtype)
    x = batch().to(dtype)
    want = gradients(alone(model), x)

    def checkpointed(h):
        for layer in model:
            h = checkpoint(layer, h, use_reentrant=use_reentrant)
        return h

    tolerance = {} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 0.2}
    for _ in range(3):
        assert_same(gradients(model, x, checkpointed), want, **tolerance)
    assert groups == [3] * 12, "two layers, forward and recomputation, three times"


@pytest.mark.parametrize("layer_by_layer", [True, False])
def test_checkpoints_of_overlapping_forwards(layer_by_layer, groups):
    """A forward is recomputed after a later one."""
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
    model, _ = make_model()
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


def test_a_recomputation_that_stops_early_is_no_miss():
    model = make_model()[0].double()
    reference = alone(model)

    def call(model):
        def forward(x):
            q = model[0].q(x).sin()  # the last that is saved; k and v are linear from here on
            return torch.cat([q, model[0].k(x), model[0].v(x)], -1)

        return lambda x: checkpoint(forward, x, use_reentrant=False)

    for _ in range(4):
        got = gradients(model, batch().double(), call(model))
        assert_same(got, gradients(reference, batch().double(), call(reference)))


def test_outputs_that_the_loss_does_not_use():
    model = make_model()[0].double()
    reference = alone(model)
    for m in (model, reference):
        m[0].q(batch().double())
    for m in (model, reference):
        x = batch().double()
        q, _, v = m[0].q(x), m[0].k(x), m[0].v(x)
        (q.sum() + v.square().sum()).backward()
        assert m[0].k.lora_B.grad is None or not m[0].k.lora_B.grad.any()
    for name in ("q", "v"):
        torch.testing.assert_close(
            getattr(model[0], name).lora_A.grad, getattr(reference[0], name).lora_A.grad
        )


def test_threads_do_not_take_each_others_outputs(groups):
    model, _ = make_model()
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
    """Those of DataParallel live for one forward and share the group of their originals."""
    model, _ = make_model()
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
    assert model[0].q.group.modules() == adapted(model)


@pytest.mark.parametrize("inside", ["k", "kv"])
def test_a_checkpoint_around_some_members(inside):
    """What it saves is the same when it runs again, whoever was called before it."""

    def call(model):
        def some(x):
            return torch.cat([getattr(model[0], name)(x).tanh() for name in inside], -1)

        def forward(x):
            q = model[0].q(x)
            parts = [checkpoint(some, x, use_reentrant=False), model[0].v(x)]
            return torch.cat([q, *parts, checkpoint(model[0].k, x, use_reentrant=False)], -1)

        return forward

    model = make_model()[0].double()
    reference = alone(model)
    for shape in ((5, K), (2, 3, K)):
        x = torch.randn(shape, dtype=torch.float64)
        assert_same(gradients(model, x, call(model)), gradients(reference, x, call(reference)))


def test_the_graph_that_x_came_from_is_not_kept():
    model, _ = make_model()
    before = torch.nn.Linear(K, K)
    weight = weakref.ref(before.weight)
    y = model(before(batch()).tanh())
    del before, y
    gc.collect()
    assert weight() is None
