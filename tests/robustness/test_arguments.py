"""Arguments of another kind than they should be: the error names what belongs there."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import nsru_kernels as nk

K, N = 8, 6


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(K, N), nn.Linear(K, N)

    def forward(self, x):
        return self.q(x) + self.k(x)


def swap(model=None, targets=("q", "k"), **changes):
    return nk.swap_linears(model or Model(), targets, **{"rank": 2, "alpha": 4, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": {"q": 4}}, r"rank is one number .* got \{'q': 4\}.* as rank_pattern"),
        ({"alpha": {"q": 4}}, r"alpha is one number .* got \{'q': 4\}.* as alpha_pattern"),
        ({"rank_pattern": [("q", 4)]}, r"rank_pattern must map names .* got \[\('q', 4\)\]"),
        ({"rank_pattern": 4}, "rank_pattern must map names of modules to numbers, got 4"),
        ({"alpha_pattern": {1: 4}}, r"alpha_pattern must map names .* got \{1: 4\}"),
        ({"targets": None}, "targets must be names of linear layers, .* got None"),
        ({"targets": [4]}, "targets must be names of linear layers, .* got 4"),
        ({"exclude": [["q"]]}, r"exclude must be names of linear layers, .* got \['q'\]"),
        ({"subspaces": torch.eye(K)[:, :2]}, "subspaces must map names .* got Tensor"),
        ({"subspaces": [1]}, "subspaces must map names of modules .* got list"),
    ],
)
def test_a_swap_says_what_belongs_there(changes, message):
    model = Model()
    with pytest.raises(TypeError, match=message):
        swap(model, **changes)
    assert type(model.q) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("value", [True, 2.0, "4", None, [4], torch.tensor(4), 0, -1])
def test_a_rank_or_width_is_a_whole_number(value):
    for name, make in {
        "rank": lambda: nk.NSRULinear(K, N, value, alpha=4),
        "q: NSRULinear: rank": lambda: swap(rank_pattern={"q": value}),
        "width": lambda: nk.RetainSketch(K, value),
        "in_features": lambda: nk.RetainSketch(value, 4),
    }.items():
        with pytest.raises(ValueError, match=rf"{name} must be ≥ 1, got .*; give a whole number"):
            make()


@pytest.mark.parametrize("value", [True, "0.5", None, float("nan"), [0.5], -0.5])
def test_a_dropout_or_share_is_a_number(value):
    with pytest.raises(ValueError, match=r"NSRULinear: dropout must be in \[0, 1\], got"):
        nk.NSRULinear(K, N, 2, alpha=4, dropout=value)
    with pytest.raises(ValueError, match="energy must be above 0 and at most 1, got"):
        nk.estimate_retain_subspaces(Model(), [], "q", width=4, energy=value or "")


def test_numbers_of_numpy_are_written_as_numbers(tmp_path):
    model = Model()
    base = copy.deepcopy(model)
    swap(model, rank=np.int64(2), alpha=np.float32(4), dropout=np.float32(0))
    folder = nk.save_lora_adapter(model, tmp_path)
    assert nk.load_lora_adapter(base, folder).swapped == ["q", "k"]


def test_a_key_that_names_nothing_is_not_for_all():
    with pytest.raises(ValueError, match="rank_pattern has '', which no target takes"):
        swap(rank_pattern={"": 4})


class Reader(Model):
    def __init__(self):
        super().__init__()
        self.read = nn.Linear(K, N)

    def forward(self, x):
        return super().forward(x) + x @ self.read.weight.T


def test_targets_and_exclusions_may_come_from_an_iterator():
    """They are gone through again once it is known which weights are read elsewhere."""
    model, batch = Reader(), {"x": torch.ones(2, K)}
    named = {"targets": iter(["all-linear"]), "exclude": iter(["q"])}
    assert list(nk.estimate_retain_subspaces(model, [batch], width=4, rank=1, **named)) == ["k"]
    named = {"targets": iter(["all-linear"]), "exclude": iter(["q"])}
    assert swap(model, batch=batch, **named).swapped == ["k"]


ODD = {
    "a ndarray; torch.as_tensor": lambda x: x.numpy(),
    "a NoneType": lambda x: None,
    "one of layout torch.sparse_coo; to_dense": lambda x: x.to_sparse(),
    "one of layout torch.sparse_csr; to_dense": lambda x: x.to_sparse_csr(),
    "one of layout torch._mkldnn; to_dense": lambda x: x.to_mkldnn(),
    "a quantized one": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "a nested one; torch.nested.to_padded": lambda x: torch.nested.nested_tensor([x, x]),
}


@pytest.mark.filterwarnings("ignore:.*(beta|deprecated|prototype):UserWarning")
@pytest.mark.parametrize("got", ODD)
@pytest.mark.parametrize("together", [False, True])
def test_what_is_no_dense_tensor_is_refused_by_every_op(got, together):
    odd = ODD[got](torch.ones(3, K))
    model = Model()
    swap(model, siblings=together, batch={"x": torch.ones(3, K)})
    x, w, a, b = torch.ones(3, K), torch.ones(N, K), torch.ones(2, K), torch.ones(N, 2)
    calls = {
        "x": [
            lambda: model.q(odd),
            lambda: nk.nsru_linear(odd, w, a, b),
            lambda: nk.nsru_linear_group(odd, [w], [a], [b], scalings=[1.0]),
            lambda: nk.RetainSketch(K, 4).update(odd),
        ],
        "weight": [lambda: nk.nsru_linear(x, odd, a, b)],
        "lora_a": [lambda: nk.nsru_linear(x, w, odd, b), lambda: nk.project_adapter(odd, None)],
        "lora_b": [lambda: nk.nsru_linear(x, w, a, odd)],
    }
    if odd is not None:
        calls["basis"] = [lambda: nk.project_adapter(a, odd)]
        calls["bias"] = [lambda: nk.nsru_linear(x, w, a, b, None, odd)]
    for name, call in [(name, call) for name, some in calls.items() for call in some]:
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises(TypeError) as refusal:
                call()
            assert f"{name} must be a dense tensor, got {got}" in str(refusal.value)


def test_an_input_on_another_device_is_refused():
    layer = nk.NSRULinear(K, N, 2, alpha=4)
    with pytest.raises(ValueError, match=r"x is on meta, weight on cpu\. Move"):
        layer(torch.ones(3, K, device="meta"))


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.ones(N, K).to_sparse(), "its weight is of torch.sparse_coo .*only dense floats"),
        (torch.ones(N, K, dtype=torch.int8), "its weight is of .* torch.int8; only dense floats"),
    ],
)
def test_a_linear_of_other_weights_is_left_alone(weight, reason):
    model = Model()
    model.q.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=rf"'q' matches q, which cannot be swapped: {reason}"):
        swap(model)
    assert swap(model, "all-linear").swapped == ["k"]


@pytest.mark.parametrize("model", [None, "model", Model, {}])
def test_what_is_no_model_is_refused(model, tmp_path):
    for call in (
        lambda: nk.swap_linears(model, "q", rank=2, alpha=4),
        lambda: nk.estimate_retain_subspaces(model, [], "q", width=4, rank=1),
        lambda: nk.save_lora_adapter(model, tmp_path),
        lambda: nk.merge_adapters(model),
    ):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got"):
            call()
