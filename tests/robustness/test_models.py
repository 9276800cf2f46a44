"""Odd models: wrapped, cast, tied, called by name; lazy tensors; activations of any size."""

import copy
import json
import math
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from transformers import BatchEncoding

import nsru_kernels as nk
from nsru_kernels.hf.peft_format import CONFIG, SIDECAR, WEIGHTS
from nsru_kernels.subspaces.collection import fingerprint_weights

K = 32


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(K, K), nn.Linear(K, K, bias=False)

    def forward(self, x):
        return self.q(x).tanh() + self.k(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, K)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(K, 10, bias=False)

    def forward(self, ids, attention_mask=None):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


ids = torch.arange(20).reshape(4, 5) % 10
LINEARS = [f"layers.{i}.{name}" for i in (0, 1) for name in "qk"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def make_basis(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(K, 6, generator=generator, dtype=torch.float64)).Q.float()


def adapt(model, targets=("q", "k"), **options):
    options = {"rank": 4, "alpha": 8, "subspaces": dict.fromkeys(LINEARS, make_basis())} | options
    nk.swap_linears(model, targets, **options)
    for module in model.modules():
        if isinstance(module, nk.NSRULinear):
            nn.init.normal_(module.lora_B)
    return model


def by_peft(model, folder):
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)


# Wrappers


def compile_layer(model):
    model.layers[0] = torch.compile(model.layers[0])
    return model


def compile_linear(model):
    model.layers[0].q = torch.compile(model.layers[0].q)
    return model


def checkpoint_layer(model):
    model.layers[1] = checkpoint_wrapper(model.layers[1])
    return model


WRAPPERS = {
    "compiled": torch.compile,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "data parallel": nn.DataParallel,
    "one in the other": lambda model: torch.compile(nn.DataParallel(model)),
    "compiled layer": compile_layer,
    "compiled linear": compile_linear,
    "checkpointed layer": checkpoint_layer,
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_is_saved_as_the_plain_one(model, tmp_path, wrap):
    adapted = adapt(copy.deepcopy(model))
    nk.save_lora_adapter(adapted, tmp_path / "plain")
    wrapped = WRAPPERS[wrap](copy.deepcopy(adapted))
    nk.save_lora_adapter(wrapped, tmp_path / "wrapped")
    plain, found = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "wrapped"))
    assert found.keys() == plain.keys()
    for name in (CONFIG, SIDECAR):
        read = [json.loads((tmp_path / f / name).read_text()) for f in ("plain", "wrapped")]
        assert read[0] == read[1]
    torch.testing.assert_close(by_peft(model, tmp_path / "wrapped")(ids), adapted(ids))
    assert fingerprint_weights(wrapped) == fingerprint_weights(model)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_is_saved_as_the_plain_model_and_takes_no_late_adapters(model, tmp_path, process_group):
    with pytest.raises(ValueError, match=r"DistributedDataParallel.* Swap first, then wrap"):
        nk.swap_linears(DistributedDataParallel(copy.deepcopy(model)), "q", rank=2, alpha=4)
    adapted = adapt(model)
    nk.save_lora_adapter(adapted, tmp_path / "plain")
    nk.save_lora_adapter(DistributedDataParallel(adapted), tmp_path / "wrapped")
    plain, found = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("plain", "wrapped"))
    assert plain == found


@pytest.mark.parametrize("wrap", ["compiled", "compiled layer", "checkpointed layer"])
def test_a_wrapped_model_loads_an_adapter(model, tmp_path, wrap):
    adapted = adapt(copy.deepcopy(model))
    nk.save_lora_adapter(adapted, tmp_path, metadata={"fingerprint": fingerprint_weights(model)})
    wrapped = WRAPPERS[wrap](copy.deepcopy(model))
    report = nk.load_lora_adapter(wrapped, tmp_path)
    assert len(report.swapped) == 4
    module = wrapped.get_submodule(report.swapped[0]) if wrap != "compiled" else None
    assert module is None or isinstance(module, nk.NSRULinear)
    merged = nk.merge_adapters(wrapped)
    assert not any(isinstance(m, nk.NSRULinear) for m in merged.modules())


def test_subspaces_of_the_model_before_it_was_wrapped_are_told_apart(model):
    with pytest.raises(ValueError, match=r"no entry for .* Swap before layers are compiled"):
        adapt(compile_layer(model))


def test_a_compiled_linear_is_not_swapped_and_merges_with_its_wrapper(model):
    adapted = adapt(copy.deepcopy(model))
    wanted = adapted.layers[0].q.merged_weight()
    merged = nk.merge_adapters(compile_linear(adapted))
    assert type(merged.layers[0].q) is nn.Linear, "what was compiled would go on as it was"
    assert torch.equal(merged.layers[0].q.weight, wanted)
    report = nk.swap_linears(compile_linear(model), "all-linear", rank=2, alpha=4)
    assert report.skipped["layers.0.q._orig_mod"].startswith("is compiled by itself")


# Casts


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_a_cast_leaves_the_bases_as_they_are(model, tmp_path, cast):
    adapted = adapt(model).to(cast)
    layer = adapted.layers[0].q
    assert torch.equal(layer.basis, make_basis())
    nk.save_lora_adapter(adapted, tmp_path)
    a_RK = load_file(tmp_path / WEIGHTS)["base_model.model.layers.0.q.lora_A.weight"]
    assert (a_RK @ make_basis()).norm() <= 1e-6 * a_RK.norm()
    assert adapted.double().layers[0].q.basis.dtype == torch.float64


def test_a_rounded_basis_from_a_checkpoint_still_projects(model):
    adapted = adapt(model)
    state = adapted.state_dict()
    rounded = {n: t.bfloat16() if n.endswith("basis") else t for n, t in state.items()}
    adapted.load_state_dict(rounded)
    layer = adapted.layers[0].q
    u = layer.basis.float()
    assert (layer.projected_adapter() @ u).norm() <= 1e-5 * layer.lora_A.norm()


# Memory that two share


def tie_by_storage(model):
    model.head.weight = nn.Parameter(model.embed.weight.data)


def tie_rows(model):
    model.head.weight = nn.Parameter(torch.zeros(12, K)[2:])
    model.embed.weight = nn.Parameter(model.head.weight.data.as_strided((10, K), (K, 1), 0))


def tie_transposed(model):
    model.head = nn.Linear(K, K)
    model.embed.weight = nn.Parameter(model.head.weight.data.T)


def tie_buffer(model):
    model.register_buffer("kept", model.head.weight.data.view(-1)[5:6])


@pytest.mark.parametrize("tie", [tie_by_storage, tie_rows, tie_transposed, tie_buffer])
def test_weights_in_one_memory_are_tied(model, tie):
    tie(model)
    with pytest.raises(ValueError, match="head, which cannot be swapped: its weight is tied"):
        nk.swap_linears(model, ["head"], rank=2, alpha=4)


def test_weights_side_by_side_in_one_storage_are_not_tied(model):
    flat = torch.randn(2 * K, K)
    for linear, part in zip((model.layers[0].q, model.layers[0].k), flat.chunk(2), strict=True):
        linear.weight = nn.Parameter(part)
    assert len(nk.swap_linears(model, ["q", "k"], rank=2, alpha=4).swapped) == 4


# Lazy views


@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "bias", "basis", "gradient"])
def test_triton_reads_negated_views_as_negated(name):
    torch.manual_seed(0)
    tensors = {
        "x": torch.randn(18, K), "weight": torch.randn(16, K), "lora_a": torch.randn(4, K),
        "lora_b": torch.randn(16, 4), "bias": torch.randn(16), "basis": make_basis(),
        "gradient": torch.randn(18, 16),
    }  # fmt: skip

    def results(backend):
        inputs = {n: t.detach() for n, t in tensors.items()}
        inputs[name] = torch._neg_view(inputs[name])
        gradient = inputs.pop("gradient")
        for n in ("x", "lora_a", "lora_b"):
            inputs[n].requires_grad_()
        y = nk.nsru_linear(**inputs, backend=backend)
        y.backward(gradient)
        return y, *[inputs[n].grad for n in ("x", "lora_a", "lora_b")]

    for found, wanted in zip(results("triton"), results("eager"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_sketch_and_the_triton_projection_read_negated_views_as_negated():
    from nsru_kernels.ops.sketch import update_sketch

    x, omega = torch.randn(20, K), torch.randn(K, 16)
    sums = []
    for negated in (torch._neg_view, torch.neg):
        y, h = torch.zeros(K, 16), torch.zeros(16, 16)
        update_sketch(negated(x), omega, y, h)
        update_sketch(x, negated(omega), y, h)
        sums.append(y)
    torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no lazy view"):
        update_sketch(x, omega, torch._neg_view(torch.zeros(K, 16)), torch.zeros(16, 16))
    a = torch.randn(4, K)
    negated = nk.project_adapter(torch._neg_view(a), make_basis(), backend="triton")
    torch.testing.assert_close(negated, -nk.project_adapter(a, make_basis()))


def test_lazy_zeros_are_zeros():
    x = torch._efficientzerotensor(5, K)
    y = nk.nsru_linear(
        x, torch.randn(16, K), torch.randn(4, K), torch.randn(16, 4), backend="triton"
    )
    assert not y.any()


def test_negated_values_are_saved_as_they_are(model, tmp_path):
    adapted = adapt(model)
    layer = adapted.layers[0].q
    wanted = -layer.lora_B.detach()
    layer.lora_B = nn.Parameter(torch._neg_view(layer.lora_B.detach()))
    nk.save_lora_adapter(adapted, tmp_path)
    saved = load_file(tmp_path / WEIGHTS)["base_model.model.layers.0.q.lora_B.weight"]
    assert torch.equal(saved, wanted)


# Activations


SCALES = [
    (torch.float32, 1e-25), (torch.bfloat16, 1e-25), (torch.float64, 1.0), (torch.float64, 1e-60),
    (torch.float64, 1e15),
]  # fmt: skip


@pytest.mark.parametrize("width", [20, 40])  # Nyström, covariance
@pytest.mark.parametrize(("dtype", "size"), SCALES)
def test_the_sketch_takes_activations_of_any_size(width, dtype, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 100, generator=generator) / torch.arange(1, 101)
    found, wanted = nk.RetainSketch(100, width), nk.RetainSketch(100, width)
    for batch in x.split(130):
        found.update((batch.double() * size).to(dtype))
        wanted.update(batch)
    one, other = found.finalize(6), wanted.finalize(6)
    assert found.trace / size**2 == pytest.approx(wanted.trace, rel=1e-3)
    assert one.captured_energy == pytest.approx(other.captured_energy, rel=1e-3)
    assert one.captured_energy < 0.95
    assert (one.basis.T @ other.basis).norm() ** 2 == pytest.approx(6, rel=1e-4)


@pytest.mark.parametrize("width", [20, 40])
def test_tiny_batches_beside_others_do_not_count(width):
    x = torch.randn(300, 100, generator=torch.Generator().manual_seed(0)) / torch.arange(1, 101)
    found, wanted = nk.RetainSketch(100, width), nk.RetainSketch(100, width)
    for size in (1e-25, 1.0, 1e-25):
        found.update(x * size)
        wanted.update(x if size == 1 else torch.zeros_like(x))
    assert found.trace == pytest.approx(wanted.trace, rel=1e-12)
    one, other = found.finalize(6), wanted.finalize(6)
    values = torch.linalg.eigvalsh(x.double().T @ x.double())
    best = (values[-6:].sum() / values.sum()).item()
    assert 0.99 * other.captured_energy <= one.captured_energy <= best * (1 + 1e-6)
    with pytest.raises(ValueError, match="vanish in fp64; scale"):
        nk.RetainSketch(100, width).update(x.double() * 1e-200)


def test_editability_of_tiny_activations():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, 4))
    options = {"width": 24, "rank": 6, "progress": False}
    retain, forget = torch.randn(40, K) / torch.arange(1, K + 1), torch.randn(9, K)
    sizes = (1.0, 1e-25)
    whole, tiny = (
        nk.estimate_retain_subspaces(
            model, [retain * size], "0", forget_batches=[forget * size], **options
        ).inputs[0]
        for size in sizes
    )
    assert tiny.editability == pytest.approx(whole.editability, rel=1e-4)
    assert tiny.captured_energy == pytest.approx(whole.captured_energy, rel=1e-4)


# Calls and batches


def test_a_layer_is_called_as_nn_linear_is(model):
    layer = adapt(model).layers[0].q
    x = torch.randn(3, K)
    assert torch.equal(layer(input=x), layer(x))


def shapes_of_batches():
    mask = torch.tensor([[1, 1, 1, 1, 0]] * 4)
    named = {"ids": ids, "attention_mask": mask}
    return {
        "tuple": ((ids, mask), named),
        "list": ([ids, mask], named),
        "tensor": (ids, {"ids": ids}),
        "one in a tuple": ((ids,), {"ids": ids}),
    }


@pytest.mark.parametrize("kind", shapes_of_batches())
@pytest.mark.parametrize("hidden", [False, True])
def test_batches_may_be_tensors_and_tuples(model, kind, hidden):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    batch, named = shapes_of_batches()[kind]
    network = Wrapper() if hidden else model
    options = {"width": 12, "rank": 4, "progress": False}
    found = nk.estimate_retain_subspaces(network, [batch], "q", **options)
    wanted = nk.estimate_retain_subspaces(
        network, [{"ids": ids} if hidden else named], "q", **options
    )
    for name, subspace in wanted.items():
        assert torch.equal(found[name].basis, subspace.basis)
        assert found[name].tokens == subspace.tokens
    assert nk.swap_linears(network, "q", rank=2, alpha=4, batch=batch).observed


@pytest.mark.parametrize(
    ("batch", "match"),
    [("ids", "dicts, tuples or tensors"), ((ids, ids, ids), "does not take 3 arguments")],
)
def test_other_batches_are_refused(model, batch, match):
    with pytest.raises(TypeError, match=match):
        nk.estimate_retain_subspaces(model, [batch], "q", width=12, rank=4, progress=False)


# Weights in another dtype


def fingerprinted(folder, model):
    """Subspaces and an adapter of this model, from their folders."""
    subspaces = nk.estimate_retain_subspaces(model, [ids], "q", width=12, rank=4, progress=False)
    metadata = {"fingerprint": subspaces.fingerprint}
    nk.save_lora_adapter(adapt(copy.deepcopy(model)), folder / "adapter", metadata=metadata)
    return subspaces, folder / "adapter"


@pytest.mark.parametrize(
    ("then", "now", "hint"),
    [
        (torch.float16, torch.float32, "Only the dtype differs: load this model in float16."),
        (torch.float32, torch.float16, "load it in the dtype it had then, float32 or bfloat16."),
        (torch.float32, torch.bfloat16, None),
        (torch.bfloat16, torch.float32, "wrong"),  # other weights: bfloat16 has rounded them
    ],
)
def test_a_model_in_another_dtype_is_told_from_another_model(model, tmp_path, then, now, hint):
    here = copy.deepcopy(model)
    if hint == "wrong":
        with torch.no_grad():
            here.layers[0].q.weight += 1
    subspaces, adapter = fingerprinted(tmp_path, model.to(then))
    here = here.to(now)
    if hint is None:
        subspaces.check_model(here)
        nk.load_lora_adapter(here, adapter)
        return
    for read in (subspaces.check_model, lambda model: nk.load_lora_adapter(model, adapter)):
        with pytest.raises(ValueError, match="fingerprint") as error:
            read(here)
        start, _, reason = str(error.value).partition("fingerprint")
        assert "dtype" not in reason if hint == "wrong" else reason.endswith(hint)
        assert start.count(str(adapter)) == (read != subspaces.check_model)


class Causal(Model):
    """As transformers names its arguments."""

    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask)


LISTS, ARRAY = ids.tolist(), ids.numpy()
BATCHES = [
    ([ARRAY], "tuples or tensors.*got ndarray; .*torch.as_tensor"),
    (ARRAY, "got ndarray; "),
    ([{"input_ids": ARRAY}], r"got ndarray in a dict; .*return_tensors='pt'"),
    ([BatchEncoding({"input_ids": LISTS, "attention_mask": LISTS})], "got int in a BatchEncoding"),
    ([{"input_ids": LISTS, "attention_mask": ids}], r"input_ids must be a tensor \[B, T\], got li"),
    ([{"input_ids": ids, "attention_mask": ARRAY}], "attention_mask must be .*, got ndarray"),
    ([(ids, ARRAY)], "attention_mask must be a tensor .*, got ndarray"),
    ([LISTS], "got int in a list"),
    (LISTS, "got int in a list"),
    (LISTS[0], "got int; "),
    (3, "iterable of batches, got 3"),
    ([ids[0]], r"input_ids must be \[B, T\], got \(5,\); use ids\[None\]"),
    (ids, r"input_ids must be \[B, T\].*batches=\[ids\]"),
    ([{"input_ids": ids[0]}], r"input_ids must be \[B, T\]"),
]


@pytest.mark.parametrize(("batches", "match"), BATCHES)
def test_numbers_that_are_no_batch_of_tensors_are_refused(batches, match):
    good = [ids]
    options = {"width": 12, "progress": False}
    with pytest.raises((TypeError, ValueError), match=f"^batches.*{match}"):
        nk.estimate_retain_subspaces(Causal(), batches, "q", rank=4, **options)
    with pytest.raises((TypeError, ValueError), match=f"^(forget_)?batches.*{match}"):
        nk.estimate_retain_subspaces(
            Causal(), good, "q", forget_batches=batches, min_editability=0.1, **options
        )


# Targets


@pytest.mark.parametrize(
    ("targets", "exclude", "swapped"),
    [
        (r"layers\.1\..*", (), LINEARS[2:]),
        (r".*\.(q|k)", ["layers.0.k", "layers.1.q"], [LINEARS[0], LINEARS[3]]),
        ("all-linear", "k", ["layers.0.q", "layers.1.q", "head"]),
        (["head", r"layers\.\d\.q"], r".*1\.q", ["layers.0.q", "head"]),
    ],
)
def test_targets_by_expression_and_exclusion(model, targets, exclude, swapped):
    report = nk.swap_linears(model, targets, exclude=exclude, rank=2, alpha=4)
    assert report.swapped == swapped


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"targets": r"q("}, r"target 'q\(' is no regular expression"),
        ({"targets": r".*z\d"}, "target .* matches no linear layer"),
        ({"exclude": "z"}, "exclude 'z' matches no linear layer"),
        ({"exclude": ["q", "k"]}, "leaves none of the targets"),
        (
            {"exclude": "all-linear"},
            "exclude must name linear layers, got .all-linear.: it leaves none",
        ),
        ({"rank_pattern": {"z": 3}}, r"rank_pattern has 'z', which no target takes"),
        ({"rank_pattern": {"q": 3, "layers.0.q": 2}}, "'layers.0.q', which no target takes"),
        ({"alpha_pattern": {"(": 3}}, "no regular expression"),
        ({"rank_pattern": {"q": 0}}, r"layers\.0\.q: NSRULinear: rank must be"),
        ({"alpha_pattern": {"q": math.nan}}, "alpha must be a finite number"),
    ],
)
def test_targets_and_patterns_that_mean_nothing_are_refused(model, options, match):
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=match):
        nk.swap_linears(model, **{"targets": ["q", "k"], "rank": 2, "alpha": 4, **options})
    assert [type(m) for m in model.modules()] == before


def test_subspaces_of_all_but_the_excluded(model):
    found = nk.estimate_retain_subspaces(
        model, [ids], "all-linear", exclude=["head", "k"], width=12, rank=4, progress=False
    )
    assert list(found) == ["layers.0.q", "layers.1.q"]


RANKS = {r"layers.0.k": 3, "k": 2, r"layers\.\d\.q": 5}
ALPHAS = {"layers.1.q": 1.5, r"(q|k)": 7}
# PEFT sorts the keys that it writes, whatever their order meant.
SORTED = {
    "rank_pattern": {"layers.0.k": 3, r"layers\.\d\.q": 5},
    "alpha_pattern": {"layers.0.(q|k)": 7, "layers.1.q": 1.5},
}


def test_patterns_of_ranks_and_alphas_are_those_of_peft(model, tmp_path):
    adapted = adapt(copy.deepcopy(model), rank_pattern=RANKS, alpha_pattern=ALPHAS)
    sizes = {n: (m.rank, m.alpha) for n, m in adapted.named_modules() if n in LINEARS}
    assert list(sizes.values()) == [(5, 7), (3, 7), (5, 1.5), (2, 7)]
    nk.save_lora_adapter(adapted, tmp_path)
    torch.testing.assert_close(by_peft(model, tmp_path)(ids), adapted(ids))
    again = copy.deepcopy(model)
    nk.load_lora_adapter(again, tmp_path)
    torch.testing.assert_close(again(ids), adapted(ids))


@pytest.mark.parametrize("alpha", [1e-320, 1e-42, 1e300])
def test_an_alpha_that_is_no_scale_is_refused(model, tmp_path, alpha):
    nk.save_lora_adapter(adapt(copy.deepcopy(model), alpha_pattern=ALPHAS), tmp_path)
    sidecar = json.loads((tmp_path / SIDECAR).read_text())
    sidecar["alphas"]["layers.1.q"] = alpha
    (tmp_path / SIDECAR).write_text(json.dumps(sidecar))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"nsru.json says that layers.1.q had alpha .*; expected"):
        nk.load_lora_adapter(model, tmp_path)
    torch.testing.assert_close(model(ids), before(ids), rtol=0, atol=0)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_wrote_with_patterns_is_read_back(model, tmp_path, rslora):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=3, target_modules=["q", "k"], use_rslora=rslora, init_lora_weights=False,
        **SORTED,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(model)
    nk.load_lora_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(ids), theirs(ids))
    nk.save_lora_adapter(ours, tmp_path / "again")
    torch.testing.assert_close(by_peft(model, tmp_path / "again")(ids), theirs(ids))


def test_names_that_fit_each_other_as_expressions_keep_their_ranks(tmp_path):
    class Alike(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.aaproj = nn.ModuleDict({"proj": nn.Linear(K, K)}), nn.Linear(K, K)
            for name in ("b+", "b("):
                self.add_module(name, nn.Linear(K, K))

        def forward(self, x):
            others = (self.get_submodule(name)(x) for name in ("b+", "b("))
            return self.a["proj"](x).tanh() + self.aaproj(x) + sum(others)

    base, x = Alike(), torch.randn(3, K)
    adapted = copy.deepcopy(base)
    ranks = {r"^a\.proj": 2, r"b\+": 3}
    adapt(adapted, "all-linear", rank_pattern=ranks, subspaces=None)
    nk.save_lora_adapter(adapted, tmp_path)
    torch.testing.assert_close(by_peft(base, tmp_path)(x), adapted(x))
    nk.load_lora_adapter(base, tmp_path)
    torch.testing.assert_close(base(x), adapted(x))


def test_layers_of_a_config_of_peft_are_its_layers(model, tmp_path):
    peft = pytest.importorskip("peft")
    whole = nn.Sequential(OrderedDict(model=model))
    config = peft.LoraConfig(
        r=2, target_modules=["q", "k"], layers_to_transform=[1], layers_pattern="layers",
        init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(whole), config)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(whole)
    assert len(nk.load_lora_adapter(ours, tmp_path).swapped) == 2
    torch.testing.assert_close(ours(ids), theirs(ids))
    saved = json.loads((tmp_path / CONFIG).read_text())
    for change in ({"layers_to_transform": 0}, {"layers_pattern": ["h"]}):
        (tmp_path / CONFIG).write_text(json.dumps(saved | change))
        with pytest.raises(ValueError, match=r"or layers_pattern in .* leave out"):
            nk.load_lora_adapter(copy.deepcopy(whole), tmp_path)


def test_a_name_that_ends_another_keeps_its_own_alpha(tmp_path):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.q = Block(), nn.Linear(K, K)

        def forward(self, x):
            return self.inner(self.q(x))

    torch.manual_seed(0)
    plain = Nested()
    adapted = copy.deepcopy(plain)
    patterns = {"rank_pattern": {"inner.q": 4, "q": 2}, "alpha_pattern": {"inner.q": 8, "q": 3}}
    nk.swap_linears(adapted, ["inner.q", "inner.k", "q"], rank=4, alpha=8, **patterns)
    for module in adapted.modules():
        if isinstance(module, nk.NSRULinear):
            nn.init.normal_(module.lora_B)
    nk.save_lora_adapter(adapted, tmp_path)
    x = torch.randn(3, K)
    torch.testing.assert_close(by_peft(plain, tmp_path)(x), adapted(x))
    nk.load_lora_adapter(plain, tmp_path)
    torch.testing.assert_close(plain(x), adapted(x))


def test_layers_of_other_libraries_of_torch_are_named():
    plain = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    model = nn.Sequential(
        torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}), nn.Linear(K, K)
    )
    report = nk.swap_linears(model, "all-linear", rank=2, alpha=4)
    assert report.swapped == ["1"]
    assert report.skipped == dict.fromkeys(["0.0", "0.1"], "gradients do not pass through Linear")


def test_sparse_weights_are_left_out_by_name():
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    sparse = model[0].weight.detach().to_sparse_csr()
    model[0].weight = nn.Parameter(sparse, requires_grad=False)
    batches = [torch.randn(5, K)]
    found = nk.estimate_retain_subspaces(model, batches, "all-linear", width=4, rank=2)
    assert list(found) == ["1"]
    report = nk.swap_linears(model, "all-linear", rank=2, alpha=4, subspaces=found)
    assert "sparse_csr" in report.skipped["0"]
