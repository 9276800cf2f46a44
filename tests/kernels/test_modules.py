"""NSRULinear and its projections: drop-in behaviour, freshness, copies, state, merging."""

import copy
import gc
import io

import pytest
import torch
import torch.nn.functional as F
from linear_cases import make_basis
from torch import nn
from torch.optim import optimizer as optimizer_module
from torch.utils.checkpoint import checkpoint

import nsru_kernels as nk
from nsru_kernels.nn import projections

K, N, R, Q = 16, 12, 3, 5


def make_layer(dtype=torch.float32, basis=True, **options):
    """A trained-looking layer: B is not zero."""
    torch.manual_seed(0)
    layer = nk.NSRULinear.from_linear(
        nn.Linear(K, N).to(dtype),
        R,
        alpha=6,
        basis=make_basis(K, Q).float() if basis else None,
        **options,
    )
    nn.init.normal_(layer.lora_B)
    return layer


def make_model(layers=3, dtype=torch.float32):
    """``layers`` linears of K → K, swapped; the first two share one basis."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(K, K) for _ in range(layers)]).to(dtype)
    shared = make_basis(K, Q).float()
    subspaces = {
        str(i): shared if i < 2 else make_basis(K, Q, seed=i).float() for i in range(layers)
    }
    nk.swap_linears(model, "all-linear", rank=R, alpha=6, subspaces=subspaces)
    for layer in model:
        nn.init.normal_(layer.lora_B)
    return model


def expected(layer, x):
    """The layer from its tensors, in float64."""
    a, b, w = (t.detach().double() for t in (layer.lora_A, layer.lora_B, layer.weight))
    if layer.basis is not None:
        u = layer.basis.double()
        a = a - (a @ u) @ u.T
    bias = None if layer.bias is None else layer.bias.detach().double()
    return F.linear(x.double(), w + layer.alpha / layer.rank * b @ a, bias).to(x.dtype)


def assert_fresh(layer, x):
    torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)


@pytest.fixture
def projected(monkeypatch):
    """How many adapters each projection of the cache took, call by call."""
    calls = []
    project = projections.project_groups

    def counted(groups, *args):
        calls.append(sum(len(lora_as) for lora_as, _ in groups))
        return project(groups, *args)

    monkeypatch.setattr(projections, "project_groups", counted)
    return calls


x = torch.randn(4, K, generator=torch.Generator().manual_seed(1))


def test_starts_as_its_frozen_linear():
    linear = nn.Linear(K, N)
    y = linear(x)
    layer = nk.NSRULinear.from_linear(linear, R, alpha=6, basis=make_basis(K, Q).float())
    assert torch.equal(layer(x), y)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


@pytest.mark.parametrize("basis", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_forward(basis, bias):
    u = make_basis(K, Q).float() if basis else None
    layer = nk.NSRULinear(K, N, R, alpha=6, basis=u, bias=bias)
    nn.init.normal_(layer.lora_B)
    assert_fresh(layer, x)
    torch.testing.assert_close(
        layer.delta_weight() @ x.T + layer.weight @ x.T, (layer(x) - (layer.bias if bias else 0)).T
    )


def test_retained_inputs_are_left_alone():
    """The point of it all: x in the retain subspace sees the frozen layer, whatever A and B are."""
    layer = make_layer()
    retained = torch.randn(7, Q) @ layer.basis.T
    frozen = F.linear(retained, layer.weight, layer.bias)
    torch.testing.assert_close(layer(retained), frozen, rtol=1e-5, atol=1e-5)
    assert (layer(x) - F.linear(x, layer.weight, layer.bias)).abs().max() > 0.1
    assert 0 < layer.leakage() <= 1e-6
    assert 0 < make_layer(torch.bfloat16).leakage() <= 5e-3
    assert make_layer(basis=False).leakage() == 0.0


def test_adapters_are_float32_under_another_default_dtype():
    linear = nn.Linear(K, N).bfloat16()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = nk.NSRULinear.from_linear(linear, R, alpha=6)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_and_device_change_nothing(dtype, tmp_path):
    def run():
        model = nn.Sequential(nn.Linear(K, N, device="cpu", dtype=torch.float32))
        with torch.no_grad():
            model[0].weight.copy_(torch.linspace(-1, 1, N * K, device="cpu").view(N, K))
        batches = [x[:7].float(), x.float()]
        subspaces = nk.estimate_retain_subspaces(
            model, batches, "all-linear", width=2, rank=2, progress=False
        )
        subspaces["0"].save(tmp_path / "0.safetensors")
        assert torch.equal(
            nk.RetainSubspace.load(tmp_path / "0.safetensors").basis, subspaces["0"].basis
        )
        nk.swap_linears(model, "all-linear", rank=2, alpha=4, subspaces=subspaces)
        return subspaces["0"].basis

    x = torch.randn(40, K, generator=torch.Generator().manual_seed(2))
    expected = run()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert torch.equal(run(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_dropout_acts_in_training_only():
    layer = make_layer(dropout=0.5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert_fresh(layer, x)


def test_adapters_disabled_is_the_frozen_layer_merged_or_not():
    layer = make_layer()
    frozen, adapted = F.linear(x, layer.weight, layer.bias), layer(x)
    with nk.adapters_disabled(layer):
        assert torch.equal(layer(x), frozen)
    assert torch.equal(layer(x), adapted)
    layer.merge()
    with nk.adapters_disabled(layer):
        assert torch.equal(layer(x), frozen)
    with pytest.raises(KeyError), nk.adapters_disabled(layer):
        raise KeyError
    assert layer.enabled


def test_one_projection_for_the_whole_model_per_optimizer_step(projected):
    """Also under gradient accumulation, checkpointing and evaluation in between."""
    model = make_model(3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(1, 4):
        for use_reentrant in (False, True):
            h = x.clone().requires_grad_()
            for layer in model:
                h = checkpoint(layer, h, use_reentrant=use_reentrant)
            h.square().sum().backward()
        with torch.no_grad():
            model(x)
        assert projected == [3] * step
        optimizer.step()
        optimizer.zero_grad()


def test_a_model_of_two_dtypes_does_not_project_at_each_call(projected):
    model = make_model(4)
    model[1].bfloat16()
    model[3].bfloat16()
    for _ in range(3):
        h = x
        for layer in model:
            h = layer(h.to(layer.weight.dtype))
    assert sum(projected) <= 4 + 2, "once each, and once more for those in another dtype"


class DataWriter(torch.optim.Optimizer):
    """An optimizer that bumps no version counter."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.copy_(p.data - 0.5 * p.grad)


def step_with(make_optimizer):
    def change(layer):
        optimizer = make_optimizer([layer.lora_A, layer.lora_B])
        layer(x).square().sum().backward()
        optimizer.step()

    return change


def load_other_state(layer):
    other = make_layer()
    nn.init.normal_(other.lora_A)
    layer.load_state_dict(other.state_dict())


def assign_other_state(layer):
    state = {n: t.clone() for n, t in layer.state_dict().items()}
    nn.init.normal_(state["lora_A"])
    layer.load_state_dict(state, assign=True)


def replace_parameter(layer):
    layer.lora_A = nn.Parameter(torch.randn(R, K))


@torch.no_grad()
def edit_in_place(layer):
    layer.lora_A.mul_(3)


def edit_data(layer):
    layer.lora_A.data[0, 0] += 5
    layer.invalidate()


def rebind_data(layer):
    layer.lora_A.data = torch.randn(R, K)


def edit_basis(layer):
    layer.subspace.basis.copy_(make_basis(K, Q, seed=7))


def load_basis(layer):
    layer.load_state_dict({"subspace.basis": make_basis(K, Q, seed=7).float()}, strict=False)


CHANGES = {
    "sgd": step_with(lambda params: torch.optim.SGD(params, lr=0.5)),
    "adamw foreach": step_with(lambda params: torch.optim.AdamW(params, lr=0.5, foreach=True)),
    "adamw fused": step_with(lambda params: torch.optim.AdamW(params, lr=0.5, fused=True)),
    "writes through .data": step_with(DataWriter),
    **{
        f.__name__: f
        for f in (
            load_other_state,
            assign_other_state,
            replace_parameter,
            edit_in_place,
            edit_data,
            rebind_data,
            edit_basis,
            load_basis,
        )
    },
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_projection_is_never_stale(name):
    layer = make_layer()
    before = layer(x).detach()
    CHANGES[name](layer)
    assert (layer(x) - before).abs().max() > 1e-3, "the change matters"
    assert_fresh(layer, x)


def test_optimizers_are_watched_only_while_a_module_is_there():
    gc.collect()
    found = len(optimizer_module._global_optimizer_post_hooks)
    layer = make_layer()
    watched = len(optimizer_module._global_optimizer_post_hooks)
    assert watched == max(found, 1), "one hook for all modules"
    del layer
    gc.collect()
    assert len(optimizer_module._global_optimizer_post_hooks) == found


@pytest.mark.parametrize("foreign", [torch.inference_mode, torch.no_grad])
def test_a_projection_made_in_inference_mode_serves_training(foreign):
    layer = make_layer()
    with foreign():
        layer(x)
    layer(x).square().sum().backward()
    assert layer.lora_A.grad.any()


def test_a_basis_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        basis = make_basis(K, Q).float()
    layer = nk.NSRULinear.from_linear(nn.Linear(K, N), R, alpha=6, basis=basis)
    layer(x).square().sum().backward()
    assert layer.lora_B.grad.any()


def test_merge_and_unmerge_are_exact():
    for dtype in (torch.float32, torch.bfloat16):
        layer = make_layer(dtype)
        before, y = layer.weight.clone(), layer(x.to(dtype))
        wanted = (before.float() + layer.delta_weight()).to(dtype)
        layer.merge()
        layer.merge()
        assert layer.merged
        assert torch.equal(layer.weight, wanted), "summed in float32, rounded once"
        torch.testing.assert_close(layer(x.to(dtype)), y, rtol=2e-2, atol=5e-2)
        layer.unmerge()
        layer.unmerge()
        assert torch.equal(layer.weight, before)
        assert torch.equal(layer(x.to(dtype)), y)


def test_a_merged_layer_saves_loads_moves_and_copies_as_its_unmerged_self():
    layer = make_layer()
    state = {n: t.clone() for n, t in layer.state_dict().items()}
    layer.merge()
    assert layer.state_dict().keys() == state.keys()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for moved in (copy.deepcopy(layer), copy.deepcopy(layer).double()):
        h = x.to(moved.weight.dtype)
        with nk.adapters_disabled(moved):
            torch.testing.assert_close(moved(h), F.linear(h, state["weight"].to(h), moved.bias))
        moved.unmerge()
        assert torch.equal(moved.weight.float(), state["weight"])
    layer.load_state_dict(state)
    assert not layer.merged
    assert_fresh(layer, x)


def test_a_parametrized_layer_is_not_merged():
    model = nn.Sequential(nn.Linear(K, N))
    nk.swap_linears(model, "0", rank=2, alpha=4)
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match="merge_adapters: 0 has a parametrization; remove it"):
        nk.merge_adapters(model)


def test_a_float64_weight_is_merged_in_float64():
    linear = nn.Linear(6, 5, dtype=torch.float64)
    layer = nk.NSRULinear.from_linear(linear, rank=2, alpha=4)
    nn.init.normal_(layer.lora_B)
    before, update = linear.weight.clone(), layer.delta_weight().double()
    assert torch.equal(layer.merged_weight(), before + update)


def test_merge_adapters_returns_plain_linears():
    model = make_model(3, torch.bfloat16)
    wanted = [(m.weight.float() + m.delta_weight()).bfloat16() for m in model]
    model[1].merge()
    biases = [m.bias for m in model]
    assert nk.merge_adapters(model) is model
    for layer, weight, bias in zip(model, wanted, biases, strict=True):
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, weight)
        assert layer.bias is bias
        assert not layer.weight.requires_grad
    with pytest.raises(ValueError, match=r"no NSRULinear; swap_linears"):
        nk.merge_adapters(model)
    with pytest.raises(ValueError, match=r"an NSRULinear itself; use its merge"):
        nk.merge_adapters(make_layer())


def copy_deep(model):
    return copy.deepcopy(model)


def save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy_deep, save_and_load])
def test_copies_are_independent_and_share_inside(copied, projected):
    model = make_model(3)
    y = model(x)
    other = copied(model)
    assert torch.equal(other(x), y)
    assert other[0].subspace is other[1].subspace
    assert other[0].subspace is not model[0].subspace
    assert other[0].basis.data_ptr() != model[0].basis.data_ptr()
    assert other.state_dict().keys() == model.state_dict().keys()
    assert projected == [3, 3], "the copy projects all its layers at once, like the original"
    edit_in_place(other[0])
    assert torch.equal(model(x), y)
    assert not torch.equal(other(x), y)


def test_shared_basis_is_one_tensor_through_casts_and_is_saved_once():
    model = make_model(3)
    assert model[0].subspace is model[1].subspace
    saved = [name for name in model.state_dict() if "basis" in name]
    assert saved == ["0.subspace.basis", "2.subspace.basis"]
    for cast in (model.bfloat16, model.double, lambda: model.to("meta")):
        cast()
        assert model[0].basis is model[1].basis
        assert model[0].basis.dtype == torch.promote_types(model[0].weight.dtype, torch.float32)
        assert model[0].basis.device == model[0].weight.device


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_model_to_dtype_still_projects_exactly(dtype):
    model = make_model(3).to(dtype)
    y = model(x.to(dtype))
    assert y.dtype == dtype
    for layer in model:
        a_RK = layer.projected_adapter().float()
        # bf16 adapters round once after an exact projection
        assert (a_RK @ layer.basis.float()).norm() / a_RK.norm() < 5e-3
        assert_close = torch.testing.assert_close
        h = x.to(dtype)
        assert_close(layer(h).double(), exact_of_cast(layer, h), rtol=3e-2, atol=3e-2)


def exact_of_cast(layer, h):
    """With an exact projector onto what the rounded basis spans."""
    u = torch.linalg.qr(layer.basis.double()).Q
    a = layer.lora_A.detach().double()
    a = a - (a @ u) @ u.T
    w = layer.weight.double() + layer.alpha / layer.rank * layer.lora_B.detach().double() @ a
    return F.linear(h.double(), w, layer.bias.double())


def test_state_dict_round_trip_into_a_freshly_swapped_model():
    model, other = make_model(3), make_model(3)
    for layer in other:
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.weight)
        layer.subspace.basis.copy_(make_basis(K, Q, seed=11))
    assert not torch.allclose(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))


def test_loading_leaves_the_subspaces_that_others_hold_alone():
    basis = make_basis(K, Q, seed=5).float()
    subspaces = {str(i): nk.RetainSubspace(basis) for i in range(2)}
    first, second = (nn.Sequential(nn.Linear(K, N), nn.Linear(K, N)) for _ in range(2))
    for model in (first, second):
        nk.swap_linears(model, "all-linear", rank=R, alpha=4, subspaces=subspaces)
    state = first.state_dict()
    state = {k: v.flip(0) if k.endswith("basis") else v for k, v in state.items()}
    first.load_state_dict(state)
    assert torch.equal(first[0].subspace.basis, basis.flip(0))
    assert torch.equal(second[0].subspace.basis, basis)
    assert torch.equal(subspaces["0"].basis, basis)


def test_loading_a_bad_basis_is_refused():
    layer = make_layer()
    state = layer.state_dict()
    state["subspace.basis"] = torch.full((K, Q), float("nan"))
    with pytest.raises(ValueError, match=r"basis .* holds NaN or infinite values"):
        layer.load_state_dict(state)
    state["subspace.basis"] = torch.zeros(K, Q + 1)
    with pytest.raises(RuntimeError, match=r"size mismatch for subspace\.basis"):
        layer.load_state_dict(state)


def test_fp32_adapters_in_a_bf16_model_learn():
    layer = make_layer(torch.bfloat16)
    layer(x.bfloat16()).float().square().sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    assert layer.weight.grad is None
    u = layer.basis
    assert (layer.lora_A.grad @ u).norm() / layer.lora_A.grad.norm() < 1e-5


def test_autocast_uses_and_refreshes_the_cached_projection(projected):
    layer = make_layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).float().square().sum().backward()
        layer(x)
        assert projected == [1]
        edit_data(layer)
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected(layer, x), rtol=3e-2, atol=0.2)


def test_functional_call_uses_the_parameters_it_is_given():
    layer = make_layer()
    layer(x)
    params = {n: p.detach().clone() for n, p in layer.named_parameters()}
    params["lora_A"] = torch.randn(R, K)
    y = torch.func.functional_call(layer, params, (x,))
    other = make_layer()
    other.lora_A.data.copy_(params["lora_A"])
    torch.testing.assert_close(y, expected(other, x), rtol=1e-4, atol=1e-4)
    assert_fresh(layer, x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be ≥ 1, got 0"),
        ({"dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\], got -0.1"),
        ({"backend": "gpu"}, ValueError, "backend must be 'auto' or one of .*got 'gpu'"),
        ({"basis": torch.eye(5, 2)}, ValueError, r"\[K=16, Q\].*got \(5, 2\).*another layer"),
        ({"basis": torch.ones(16)}, ValueError, r"floating \[K, Q\] matrix.*got \(16,\)"),
        ({"basis": torch.ones(16, 17)}, ValueError, r"Q ≤ K, got \(16, 17\)"),
        ({"basis": torch.full((16, 2), float("nan"))}, ValueError, "holds NaN or infinite"),
        ({"basis": torch.full((16, 2), float("inf"))}, ValueError, "holds NaN or infinite"),
        ({"basis": object()}, TypeError, "a tensor .* or a RetainSubspace, got object"),
    ],
)
def test_bad_arguments(options, error, message):
    linear = nn.Linear(K, N)
    with pytest.raises(error, match=message):
        nk.NSRULinear(K, N, **{"rank": R, "alpha": 6, **options})
    with pytest.raises(error, match=message):
        nk.NSRULinear.from_linear(linear, **{"rank": R, "alpha": 6, **options})
    assert all(p.requires_grad for p in linear.parameters()), "a refused layer stays as it was"


def test_repr_names_the_sizes():
    assert "rank=3, alpha=6, retain_rank=5, dropout=0.0" in repr(make_layer())


def test_a_subspace_is_registered_by_its_first_holder_only():
    subspace = nk.RetainSubspace(make_basis(K, Q).float())
    first, second = (nk.NSRULinear(K, N, R, alpha=6) for _ in range(2))
    first.hold(subspace)
    second.hold(subspace)
    assert "subspace.basis" in first.state_dict()
    assert "subspace.basis" not in second.state_dict()
    assert first.basis is second.basis


def test_a_users_subspace_stays_as_it_is():
    subspace = nk.RetainSubspace(make_basis(K, Q).float())
    for _ in range(2):
        layer = nk.NSRULinear(K, N, R, alpha=6, basis=subspace)
        assert "subspace.basis" in layer.state_dict()
        assert layer.to(torch.bfloat16).basis.dtype == torch.float32
        assert layer.to("meta").basis.is_meta
    assert subspace.basis.dtype == torch.float32


def test_a_replica_projects_its_own_adapter():
    layer = make_layer()
    layer(x)
    replica = layer._replicate_for_data_parallel()
    for name in ("weight", "bias", "lora_A", "lora_B"):
        setattr(replica, name, getattr(layer, name).detach() * 2)
    assert_fresh(replica, x)


def test_a_shallow_copy_leaves_the_original_alone():
    layer = make_layer()
    other = copy.copy(layer)
    assert layer.group.modules() == [layer]
    assert other.group is not layer.group
    assert_fresh(other, x)


def test_two_casts_are_an_edit():
    torch.manual_seed(0)
    layer = nk.NSRULinear(512, 8, 8, alpha=8, basis=make_basis(512, 16).float())
    nn.init.normal_(layer.lora_B)
    h = torch.randn(4, 512)
    for _ in range(10):
        nn.init.normal_(layer.lora_A)
        layer(h)
        layer.to(torch.bfloat16).to(torch.float32)
        y = layer(h)
        layer.invalidate()
        assert torch.equal(y, layer(h))


def test_edits_of_an_adapter_made_in_inference_mode_are_seen():
    layer = make_layer()
    with torch.inference_mode():
        layer.lora_A = nn.Parameter(torch.randn(R, K), requires_grad=False)
        layer(x)
        layer.lora_A.mul_(3)
        assert_fresh(layer, x)


def test_blocks_without_adapters_may_end_in_any_order():
    model = nn.Sequential(nk.NSRULinear(8, 8, 2, alpha=4))
    nn.init.normal_(model[0].lora_B)
    x = torch.randn(3, 8)
    adapted, plain = model(x), F.linear(x, model[0].weight, model[0].bias)
    first, second = nk.adapters_disabled(model), nk.adapters_disabled(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(model(x), plain), "the second block is open"
    inside = copy.deepcopy(model)
    second.__exit__(None, None, None)
    assert torch.equal(model(x), adapted)
    inside[0].enabled = True
    with nk.adapters_disabled(inside):
        assert torch.equal(inside(x), plain)
    assert torch.equal(inside(x), adapted)
