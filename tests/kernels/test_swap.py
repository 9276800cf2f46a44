"""swap_linears: what is matched, what is refused and why, and that a refusal changes nothing."""

import copy
import types

import pytest
import torch
from linear_cases import make_basis
from torch import nn

import nsru_kernels as nk
from nsru_kernels.nn.swap import match_linears

K, INNER, VOCAB = 8, 12, 20


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(K, K), nn.Linear(K, 4)
        self.mlp = nn.Sequential(nn.Linear(K, INNER), nn.ReLU(), nn.Linear(INNER, K))
        self.norm = nn.LayerNorm(K)

    def forward(self, x):
        return self.mlp(self.norm(self.q_proj(x) + self.k_proj(x).repeat(1, 2)))


class Model(nn.Module):
    """Two blocks and an output embedding, as transformers lays a model out."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, K)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(K, VOCAB, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def swap(model, targets="all-linear", **options):
    return nk.swap_linears(model, targets, **{"rank": 2, "alpha": 4, **options})


def subspaces_for(model, targets="all-linear"):
    return {
        name: types.SimpleNamespace(basis=make_basis(linear.in_features, 3).float())
        for name, linear in match_linears(model, targets)
    }


def snapshot(model):
    return [(n, id(m)) for n, m in model.named_modules()], [
        (n, p.requires_grad, p.clone()) for n, p in model.named_parameters()
    ]


def assert_untouched(model, before):
    modules, parameters = snapshot(model)
    assert modules == before[0]
    for (name, grad, value), (name_0, grad_0, value_0) in zip(parameters, before[1], strict=True):
        assert (name, grad) == (name_0, grad_0)
        assert torch.equal(value, value_0)


@pytest.mark.parametrize(
    ("targets", "swapped"),
    [
        ("q_proj", ["layers.0.q_proj", "layers.1.q_proj"]),
        (["layers.1.q_proj", "mlp.0"], ["layers.0.mlp.0", "layers.1.q_proj", "layers.1.mlp.0"]),
        (["lm_head"], ["lm_head"]),
        (["all-linear", "lm_head"], 9),
        ("all-linear", 8),
    ],
)
def test_targets(model, targets, swapped):
    report = swap(model, targets)
    now = [n for n, m in model.named_modules() if isinstance(m, nk.NSRULinear)]
    assert report.swapped == now
    assert now == swapped if isinstance(swapped, list) else len(now) == swapped
    assert set(report.swapped).isdisjoint(report.skipped)
    assert len(report.swapped) + len(report.skipped) == 9, "every linear layer is accounted for"


def test_output_stays_and_only_adapters_train(model):
    ids = torch.arange(6)
    y = model(ids)
    weight = model.layers[0].q_proj.weight
    report = swap(model, subspaces=subspaces_for(model))
    assert torch.equal(model(ids), y)
    assert model.layers[0].q_proj.weight is weight
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.{p}" for n in report.swapped for p in ("lora_A", "lora_B")}
    sizes = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.trainable == sizes
    assert report.frozen == sum(p.numel() for p in model.parameters()) - sizes
    assert report.skipped == {"lm_head": "output embedding; name it to swap it"}


def test_training_mode_and_options_are_passed_on(model):
    model.eval()
    swap(model, "q_proj", rank=5, alpha=15, dropout=0.25, backend="eager")
    layer = model.layers[1].q_proj
    assert not layer.training
    assert (layer.rank, layer.scaling, layer.dropout, layer.backend) == (5, 3.0, 0.25, "eager")


def test_report_says_what_was_and_was_not_swapped(model):
    text = str(swap(model, ["q_proj", "k_proj"]))
    assert text.startswith("swapped 4 linear layers:")
    assert "q_proj × 2" in text
    assert "4 of them without a retain basis: plain LoRA" in text
    assert "not swapped: lm_head × 1 (not among the targets)" in text


def test_retain_ranks_in_the_report(model):
    report = swap(model, "q_proj", subspaces=subspaces_for(model))
    assert report.retain_ranks == {"layers.0.q_proj": 3, "layers.1.q_proj": 3}
    assert "without a retain basis" not in str(report)


def test_one_subspace_object_is_one_basis_tensor(model):
    subspaces = subspaces_for(model)
    for i in (0, 1):
        subspaces[f"layers.{i}.k_proj"] = subspaces[f"layers.{i}.q_proj"]
    swap(model, subspaces=subspaces)
    for layer in model.layers:
        assert layer.q_proj.basis is layer.k_proj.basis
    assert model.layers[0].q_proj.basis is not model.layers[1].q_proj.basis
    saved = [n for n in model.state_dict() if n.endswith("subspace.basis")]
    assert len(saved) == len({id(s) for s in subspaces.values()}) == 6


def test_plain_tensors_may_stand_for_subspaces(model):
    tensors = {name: subspace.basis for name, subspace in subspaces_for(model).items()}
    swap(model, subspaces=tensors)
    assert torch.equal(model.layers[0].q_proj.basis, tensors["layers.0.q_proj"])


def expect_refusal(model, message, targets="all-linear", error=ValueError, **options):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        swap(model, targets, **options)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_prj", r"target 'q_prj' matches no linear layer; closest: 'q_proj' \(2 modules\)"),
        (["q_proj", "kproj"], r"target 'kproj' .* closest: 'k_proj' \(2 modules\)"),
        ("layers.5.q_proj", r"closest: .*'layers\.\d\.q_proj'"),
        ("norm", "target 'norm' matches no linear layer"),
        ("zzz", "linear layers: q_proj, k_proj, 0, 2, lm_head"),
        ("proj", "target 'proj' matches no linear layer"),
        ([], "at least one linear layer, got an empty list"),
    ],
)
def test_misspelt_targets_are_refused_with_the_closest_names(model, targets, message):
    expect_refusal(model, message, targets)


def test_bad_options_are_refused_before_anything_changes(model):
    expect_refusal(model, r"layers\.0\.q_proj: NSRULinear: rank must be ≥ 1, got 0", rank=0)
    expect_refusal(model, r"dropout must be in \[0, 1\], got 2", dropout=2)
    expect_refusal(model, "backend must be 'auto' or one of", backend="tpu")


def test_missing_and_unfit_subspaces(model):
    subspaces = subspaces_for(model)
    del subspaces["layers.1.k_proj"]
    expect_refusal(
        model, r"no entry for 1 of 8 targets, the first 'layers\.1\.k_proj'", subspaces=subspaces
    )
    expect_refusal(model, "no entry for 8 of 8 targets", subspaces={})

    subspaces = subspaces_for(model)
    subspaces["layers.1.mlp.2"] = types.SimpleNamespace(basis=torch.eye(K, 2))
    expect_refusal(model, r"layers\.1\.mlp\.2: .*\[K=12, Q\].*got \(8, 2\)", subspaces=subspaces)
    subspaces["layers.1.mlp.2"] = types.SimpleNamespace(basis=torch.full((INNER, 2), float("nan")))
    expect_refusal(model, r"layers\.1\.mlp\.2: basis \(12, 2\) holds NaN", subspaces=subspaces)
    subspaces["layers.1.mlp.2"] = None
    expect_refusal(
        model, r"layers\.1\.mlp\.2: expected a RetainSubspace .*NoneType",
        error=TypeError, subspaces=subspaces,
    )  # fmt: skip


def test_subspaces_of_another_model_are_refused(model):
    class Subspaces(dict):
        def check_model(self, model):
            raise ValueError("the weights differ")

    subspaces = Subspaces(subspaces_for(model))
    expect_refusal(model, "the weights differ", subspaces=subspaces)


class Special(nn.Linear):
    def forward(self, input):
        return super().forward(input).square()


class Conv1D(nn.Module):
    """No more than the weight of transformers' layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(K, K))


def hooked(register):
    def make():
        linear = nn.Linear(K, K)
        getattr(linear, register)(lambda *args: None)
        return linear

    return make


def replaced_forward():
    linear = nn.Linear(K, K)
    linear.forward = lambda x: x
    return linear


def offloaded():
    linear = nn.Linear(K, K)
    linear._hf_hook = object()
    return linear


UNSWAPPABLE = {
    "nonlinear subclass": (lambda: Special(K, K), "Special does not compute x Wᵀ"),
    "not callable": (Conv1D, "Conv1D cannot compute here"),
    "forward hook": (hooked("register_forward_hook"), "has hooks"),
    "pre-hook": (hooked("register_forward_pre_hook"), "has hooks"),
    "backward hook": (hooked("register_full_backward_hook"), "has hooks"),
    "replaced forward": (replaced_forward, "its forward has been replaced"),
    "offloaded": (offloaded, "accelerate moves its weights"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(K, K)),
        "has a parametrization",
    ),
}


@pytest.mark.parametrize("case", UNSWAPPABLE)
def test_what_cannot_be_swapped_is_reported_or_refused_by_name(model, case):
    make, reason = UNSWAPPABLE[case]
    model.layers[0].q_proj = make()
    expect_refusal(
        model,
        rf"target 'q_proj' matches layers\.0\.q_proj, which cannot be swapped: {reason}",
        "q_proj",
    )
    report = swap(model)
    assert report.skipped["layers.0.q_proj"].startswith(reason)
    assert "layers.1.q_proj" in report.swapped


def test_all_linear_without_anything_to_swap_says_why():
    model = nn.Sequential(Special(K, K), nn.ReLU())
    expect_refusal(model, r"no linear layer that can be swapped \(0: Special does not compute")
    expect_refusal(nn.Sequential(nn.ReLU()), "linear layers: none")


def test_tied_weights_are_left_alone(model):
    model.lm_head.weight = model.embed.weight
    expect_refusal(model, "lm_head, which cannot be swapped: its weight is tied", ["lm_head"])
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    report = swap(model)
    assert report.skipped["layers.0.q_proj"].startswith("its weight is tied")
    assert report.skipped["layers.1.q_proj"].startswith("its weight is tied")


def test_one_module_in_two_places_is_not_half_swapped(model):
    model.layers[1].q_proj = model.layers[0].q_proj
    expect_refusal(model, "the same module stands in several places", "q_proj")
    report = swap(model)
    assert report.skipped["layers.0.q_proj"].startswith("the same module stands in several places")
    assert type(model.layers[1].q_proj) is nn.Linear


def test_a_shared_block_is_swapped_once_for_all_its_places(model):
    model.layers[1] = model.layers[0]
    report = swap(model, "q_proj")
    assert report.swapped == ["layers.0.q_proj"]
    assert isinstance(model.layers[1].q_proj, nk.NSRULinear)
    nk.merge_adapters(model)
    assert type(model.layers[1].q_proj) is nn.Linear


def test_a_lone_linear_is_refused():
    expect_refusal(nn.Linear(K, K), "model is a linear layer itself; use NSRULinear.from_linear")


def test_swapping_twice_is_refused(model):
    swap(model, "q_proj")
    expect_refusal(model, r"layers\.0\.q_proj is an NSRULinear already", "k_proj")


def test_a_peft_model_is_refused(model):
    peft = pytest.importorskip("peft")
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    expect_refusal(wrapped, r"wrapped by PEFT .*merge_and_unload")


def test_meta_model_can_be_swapped_and_filled_later(model):
    with torch.device("meta"):
        empty = Model()
    swap(empty, "q_proj", subspaces=subspaces_for(model))
    swap(model, "q_proj", subspaces=subspaces_for(model))
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    ids = torch.arange(6)
    torch.testing.assert_close(empty(ids), model(ids))


def test_alpha_pattern_gives_single_modules_their_own_alpha(model):
    swap(model, alpha_pattern={"layers.1.q_proj": 10})
    assert model.layers[1].q_proj.scaling == 5
    assert model.layers[0].q_proj.scaling == model.layers[1].k_proj.scaling == 2


def test_the_report_names_layers_whose_basis_leaves_nothing_open(model):
    subspaces = subspaces_for(model)
    full = types.SimpleNamespace(basis=make_basis(K, K).float())
    report = swap(model, subspaces=subspaces | {"layers.1.k_proj": full})
    assert report.closed == ["layers.1.k_proj"]
    assert "1 of them with a retain basis of full rank, such as layers.1.k_proj" in str(report)
    assert "full rank" not in str(swap(Model(), subspaces=subspaces))


def test_a_full_name_counts_more_than_what_it_means_as_an_expression(tmp_path):
    names = ("a+b", "ab", "aab", "x(1)", "[q]")
    model = nn.ModuleDict({"d": nn.ModuleDict({name: nn.Linear(8, 8) for name in names})})
    again = copy.deepcopy(model)
    report = nk.swap_linears(model, ["d.a+b", "d.x(1)", "d.[q]"], rank=2, alpha=4)
    assert report.swapped == ["d.a+b", "d.x(1)", "d.[q]"]
    nk.save_lora_adapter(model, tmp_path)
    nk.load_lora_adapter(again, tmp_path)
    assert isinstance(again["d"]["[q]"], nk.NSRULinear)
    report = nk.swap_linears(
        nn.ModuleDict({"ab": nn.Linear(8, 8), "aab": nn.Linear(8, 8)}), "a+b", rank=2, alpha=4
    )
    assert report.swapped == ["ab", "aab"]
