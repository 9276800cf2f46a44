"""Files that anyone may have made: nothing outside their folder is touched, nothing odd used."""

import copy
import dataclasses
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import nsru_kernels as nk
from nsru_kernels.hf.peft_format import CONFIG, SIDECAR, WEIGHTS
from nsru_kernels.subspaces import InputDiagnostics, RetainSubspace, SubspaceSet
from nsru_train.data import QA, SafeTargets
from nsru_train.report import page
from nsru_train.run_folder import RunFolder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))
import samples

K, Q = 12, 3


def make_subspace(seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(K, Q, generator=generator)).Q
    return RetainSubspace(basis, torch.tensor([4.0, 3.0, 2.0]).double(), trace=10.0, tokens=77)


def make_set(*names):
    subspaces = {name: make_subspace(seed) for seed, name in enumerate(names)}
    inputs = [
        InputDiagnostics(name, [name], K, Q, 0.9, 0.25, False, 77, [0.4, 0.3, 0.2])
        for name in names
    ]
    return SubspaceSet(subspaces, inputs, "0123456789abcdef")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_entry(path, **changes):
    index = json.loads(path.read_text())
    index["inputs"][0] |= changes
    path.write_text(json.dumps(index))


# Subspaces


@pytest.mark.parametrize("name", ["/keep", "../keep", "a/b", "x" * 300, "con", "é"])
def test_names_of_modules_are_no_paths(tmp_path, name):
    outside = tmp_path / "keep.safetensors"
    outside.write_text("keep")
    name = f"{tmp_path}/keep" if name == "/keep" else name
    make_set("q_proj", name).save(tmp_path / "subspaces")
    assert outside.read_text() == "keep"
    assert {p.name for p in tmp_path.iterdir()} == {"subspaces", "keep.safetensors"}
    assert list(SubspaceSet.load(tmp_path / "subspaces")) == ["q_proj", name]


@pytest.mark.parametrize("file", ["/keep", "../keep", "./0.safetensors", "", ".", "..", "a\0b", 0])
def test_a_path_in_the_index_is_refused(tmp_path, file):
    make_set("q_proj").save(tmp_path / "subspaces")
    make_subspace().save(tmp_path / "keep")
    file = f"{tmp_path}/keep" if file == "/keep" else file
    edit_entry(tmp_path / "subspaces/index.json", file=file)
    with pytest.raises(ValueError, match=r"index\.json: file must be"):
        SubspaceSet.load(tmp_path / "subspaces")


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": "77"},
        {"tokens": -1},
        {"tokens": 78},
        {"rank": True},
        {"rank": 2},
        {"in_features": 24},
        {"captured_energy": float("nan")},
        {"captured_energy": 1.5},
        {"captured_energy": 0.99},
        {"editability": 10**400},
        {"spectrum": [0.4, None]},
        {"spectrum": [float("inf")]},
        {"editability_by_rank": [1.0, -0.5]},
        {"modules": "q_proj"},
        {"modules": []},
        {"modules": ["q_proj", "k_proj"]},
        {"rank_limited": None},
        {"surprise": 1},
    ],
)
def test_the_index_is_checked(tmp_path, changes):
    make_set("q_proj", "k_proj").save(tmp_path)
    edit_entry(tmp_path / "index.json", **changes)
    with pytest.raises(ValueError, match=r"index\.json") as refusal:
        SubspaceSet.load(tmp_path)
    assert "Traceback" not in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [{"inputs": {}}, {"inputs": ["q_proj"]}, {"fingerprint": 7}, {"sha256": [7]}],
)
def test_the_head_of_the_index_is_checked(tmp_path, changes):
    make_set("q_proj").save(tmp_path)
    edit_json(tmp_path / "index.json", **changes)
    with pytest.raises(ValueError, match=r"index\.json: (inputs|fingerprint|sha256) must be"):
        SubspaceSet.load(tmp_path)


def without_digests(folder):
    index = json.loads((folder / "index.json").read_text())
    del index["sha256"]
    (folder / "index.json").write_text(json.dumps(index))


def swap_files(folder):
    first, second = folder / "0.safetensors", folder / "1.safetensors"
    first.rename(folder / "kept")
    second.rename(first)
    (folder / "kept").rename(second)


def swap_entries(folder):
    index = json.loads((folder / "index.json").read_text())
    one, other = index["inputs"]
    one["file"], other["file"] = other["file"], one["file"]
    (folder / "index.json").write_text(json.dumps(index))


def swap_names(folder):
    index = json.loads((folder / "index.json").read_text())
    one, other = index["inputs"]
    one |= {"name": "k_proj", "modules": ["k_proj"]}
    other |= {"name": "q_proj", "modules": ["q_proj"]}
    (folder / "index.json").write_text(json.dumps(index))


def replace_basis(folder):
    rewrite(folder / "0.safetensors", basis=make_subspace(seed=7).basis)


@pytest.mark.parametrize("change", [swap_files, swap_entries, swap_names, replace_basis])
def test_a_subspace_of_another_input_is_refused(tmp_path, change):
    make_set("q_proj", "k_proj").save(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=r"safetensors is not what .*index\.json describes as"):
        SubspaceSet.load(tmp_path)


def test_without_digests_the_spectrum_tells_inputs_apart(tmp_path):
    """As in a folder that was written before there were any."""
    two = make_set("q_proj", "k_proj")
    two["k_proj"] = RetainSubspace(two["k_proj"].basis, torch.tensor([5.0, 3.0, 1.0]), 10.0, 77)
    two.inputs[1].spectrum = [0.5, 0.3, 0.1]
    two.save(tmp_path)
    without_digests(tmp_path)
    assert SubspaceSet.load(tmp_path).keys() == two.keys()
    swap_files(tmp_path)
    with pytest.raises(ValueError, match=r"0\.safetensors is not what .*index\.json describes as"):
        SubspaceSet.load(tmp_path)


def rewrite(path, **changes):
    """The file with other tensors or metadata, None for without."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for name, value in changes.items():
        part = tensors if name in ("basis", "eigenvalues") else metadata
        part[name] = value
        if value is None:
            del part[name]
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "changes",
    [
        {"trace": "nan"},
        {"trace": "inf"},
        {"trace": "-0x1p3"},
        {"trace": "0x0p0"},
        {"trace": (8.5).hex()},
        {"trace": "many"},
        {"trace": "0x1p9999"},
        {"trace": None},
        {"tokens": "-1"},
        {"tokens": "9" * 5000},
        {"tokens": None},
        {"rank_limited": "maybe"},
        {"basis": None},
        {"eigenvalues": None},
        {"basis": 2 * make_subspace().basis},
        {"basis": torch.ones(K, Q)},
        {"basis": make_subspace().basis.to(torch.float8_e4m3fn)},
        {"eigenvalues": torch.tensor([3.0, 4.0, 2.0])},
        {"eigenvalues": torch.tensor([4.0, 3.0, -2.0])},
        {"eigenvalues": torch.tensor([4.0, 3.0, torch.nan])},
        {"eigenvalues": torch.zeros(2)},
    ],
)
def test_a_subspace_that_no_sketch_finds_is_refused(tmp_path, changes):
    path = tmp_path / "some.safetensors"
    make_subspace().save(path)
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is not what a sketch finds"):
        RetainSubspace.load(path)


def test_a_rounded_basis_is_still_one(tmp_path):
    rounded = make_subspace().basis.bfloat16()
    RetainSubspace(rounded, torch.ones(Q), trace=4.0, tokens=9).save(tmp_path / "rounded")
    assert torch.equal(RetainSubspace.load(tmp_path / "rounded").basis, rounded)


@pytest.mark.parametrize("changes", [{"trace": float("nan")}, {"trace": -1.0}, {"tokens": -1}])
def test_no_such_subspace_is_made(changes):
    with pytest.raises(ValueError, match="finite and 0 or more"):
        RetainSubspace(make_subspace().basis, **changes)


@pytest.mark.parametrize("place", ["folder", "link"])
def test_what_is_no_file_is_named(tmp_path, place):
    path = tmp_path / "some"
    if place == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="some"):
        RetainSubspace.load(path)


# Adapters


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 6, bias=False), nn.Linear(8, 4)

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x)], dim=-1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def adapt(model):
    nk.swap_linears(model, "all-linear", rank=2, alpha=4)
    for name in ("q", "k"):
        nn.init.normal_(model.get_submodule(name).lora_B)
    return model


@pytest.fixture
def adapter(tmp_path, model):
    return nk.save_lora_adapter(adapt(copy.deepcopy(model)), tmp_path / "adapter")


def edit_tensor(folder, value):
    tensors = load_file(folder / WEIGHTS)
    key = "base_model.model.q.lora_B.weight"
    tensors[key] = value(tensors[key])
    save_file(tensors, folder / WEIGHTS)


def set_first(number):
    def edit(tensor):
        tensor[0, 0] = number
        return tensor

    return edit


def refuse(model, folder, match):
    with pytest.raises(ValueError, match=match) as refusal:
        nk.load_lora_adapter(model, folder)
    assert str(folder) in str(refusal.value)
    assert {type(m) for m in (model.q, model.k)} == {nn.Linear}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (set_first(torch.nan), r"q\.lora_B\.weight holds NaN or infinite"),
        (set_first(-torch.inf), r"q\.lora_B\.weight holds NaN or infinite"),
        (lambda t: t.long(), "matrix of floats, got .*int64"),
        (lambda t: t.bool(), "matrix of floats, got .*bool"),
        (lambda t: t.to(torch.float8_e5m2), "matrix of floats, got .*float8"),
        (lambda t: t[0].clone(), r"matrix of floats, got \(2,\)"),
        (lambda t: t[None].clone(), r"matrix of floats, got \(1, 6, 2\)"),
        (lambda t: t[:, :0].clone(), "has rank 2"),
    ],
)
def test_tensors_that_are_no_adapter_are_refused(model, adapter, value, match):
    edit_tensor(adapter, value)
    refuse(model, adapter, match)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"lora_alpha": "8"},
        {"lora_alpha": True},
        {"r": None},
        {"r": 2.0},
        {"r": 10**400},
        {"r": 0},
        {"rank_pattern": {"q": "2"}},
        {"rank_pattern": {"q": 3}},
        {"rank_pattern": ["q"]},
        {"alpha_pattern": {"q": float("nan")}},
        {"alpha_pattern": {"q(": 4}},
        {"use_rslora": "no"},
        {"use_qalora": True},
        {"arrow_config": {"top_k": 2}},
        {"alora_invocation_tokens": [5]},
        {"init_lora_weights": "pissa_niter_4"},
        {"bias": 0},
        {"target_modules": ["of another model"]},
        {"target_modules": "q("},
        {"target_modules": [3]},
        {"exclude_modules": ".*"},
        {"layers_to_transform": "1"},
        {"layers_to_transform": [0], "target_modules": "all-linear"},
        {"layers_pattern": "layers"},
        {"layers_to_transform": [1.5]},
    ],
)
def test_the_adapter_config_is_checked(model, adapter, changes):
    edit_json(adapter / CONFIG, **changes)
    refuse(model, adapter, rf"{next(iter(changes))}|rank|regular expression")


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_a_config_without_rank_or_alpha_is_refused(model, adapter, key):
    config = json.loads((adapter / CONFIG).read_text())
    del config[key]
    (adapter / CONFIG).write_text(json.dumps(config))
    refuse(model, adapter, rf"{CONFIG}: {key} must be (int|float) and finite, got none")


def test_a_diverged_model_is_not_merged(model):
    adapted = adapt(model)
    with torch.no_grad():
        adapted.k.lora_B[0, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    with pytest.raises(ValueError, match=r"merge_adapters: k: .*NaN or infinite .*diverged"):
        nk.merge_adapters(adapted)
    with pytest.raises(ValueError, match="NaN or infinite"):
        adapted.k.merge()
    assert adapted.state_dict().keys() == before.keys(), "nothing was merged, k nor q"
    assert torch.equal(adapted.q.weight, before["q.weight"])


def test_a_sum_beyond_half_precision_is_not_merged(model):
    adapted = adapt(model).half()
    with torch.no_grad():
        adapted.k.lora_A.fill_(200)
        adapted.k.lora_B.fill_(200)
    with pytest.raises(ValueError, match=r"k: .*infinite values in torch.float16.*overflows"):
        nk.merge_adapters(adapted)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "8", None])
def test_alpha_is_a_finite_number(alpha):
    with pytest.raises(ValueError, match="alpha must be a finite number, got"):
        nk.NSRULinear(4, 4, 2, alpha=alpha)


@pytest.mark.parametrize("rank", [{"q": 4}, 2.5, "4", None])
def test_rank_is_a_whole_number(rank):
    with pytest.raises(ValueError, match="rank must be ≥ 1, got"):
        nk.NSRULinear(4, 4, rank, alpha=2)


# Damage of any kind


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([10**400, -(2**63), float("nan"), float("inf"), 1e-320]),
    st.sampled_from(["", "/keep", "../keep", "a\0b", "nan", "q_proj", "(", "\ud800"]),
    st.sampled_from([[], {}, [[]], [None], {"": 0}]),
)


@st.composite
def damaged_json(draw, text):
    """Valid JSON with an odd value, or without a key, anywhere."""
    whole = json.loads(text)
    part, places = whole, []
    while isinstance(part, (dict, list)) and part:
        key = draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        places.append((part, key))
        part = part[key]
    part, key = draw(st.sampled_from(places))
    if draw(st.booleans()):
        part[key] = draw(ODD)
    else:
        del part[key]
    return json.dumps(whole).encode()


@st.composite
def damaged_bytes(draw, data):
    start = draw(st.integers(0, len(data)))
    stop = draw(st.integers(start, min(len(data), start + 8)) | st.just(len(data)))
    return data[:start] + draw(st.binary(max_size=9)) + data[stop:]


@st.composite
def damaged_torch(draw, data):
    """What torch.save writes, with an odd value, or without a key, anywhere."""
    whole = torch.load(io.BytesIO(data), weights_only=False)
    part, places = {"": whole}, []
    while isinstance(part, (dict, list)) and part:
        key = draw(st.sampled_from(list(part) if isinstance(part, dict) else range(len(part))))
        places.append((part, key))
        part = part[key]
    part, key = draw(st.sampled_from(places))
    odd = draw(
        ODD | st.sampled_from([torch.zeros(7), torch.tensor(torch.nan), torch.ones(()).int()])
    )
    if part is places[0][0]:
        whole = odd
    elif draw(st.booleans()):
        part[key] = odd
    else:
        del part[key]
    file = io.BytesIO()
    torch.save(whole, file)
    return file.getvalue()


@st.composite
def damaged_rows(draw, data):
    first, rest = data.split(b"\n", 1)
    return draw(damaged_json(first)) + b"\n" + rest


@st.composite
def damaged_tensors(draw, data):
    """A safetensors file with a damaged header, of the right length again."""
    length = int.from_bytes(data[:8], "little")
    header = draw(damaged_json(data[8 : 8 + length]))
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def damaged(path):
    data = path.read_bytes()
    own = {
        ".json": damaged_json,
        ".jsonl": damaged_rows,
        ".safetensors": damaged_tensors,
        ".pt": damaged_torch,
        ".pth": damaged_torch,
    }
    kinds = [damaged_bytes(data), own[path.suffix](data)]
    nested = b"[" * 100_000
    return st.one_of(*kinds, st.sampled_from([b"", b"null", b"[]", nested, b"\xff\xfe"]))


def read_or_named(read, folder):
    """What was read; nothing where an error named the file."""
    refusal = ""
    try:
        return read(folder)
    except (ValueError, OSError) as error:
        refusal = str(error)
    assert str(folder) in refusal
    return {}


@pytest.mark.parametrize("name", ["index.json", "0.safetensors"])
@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data())
def test_a_damaged_folder_of_subspaces_is_named_or_read(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("subspaces")
    make_set("q_proj", "k_proj").save(folder)
    (folder / name).write_bytes(data.draw(damaged(folder / name)))
    for subspace in read_or_named(SubspaceSet.load, folder).values():
        assert 0 <= subspace.captured_energy <= 1
        assert subspace.basis.isfinite().all()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, SIDECAR])
@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data())
def test_a_damaged_adapter_is_named_or_read(tmp_path_factory, name, data):
    torch.manual_seed(0)
    model, folder = Model(), tmp_path_factory.mktemp("adapter")
    nk.save_lora_adapter(adapt(copy.deepcopy(model)), folder)
    (folder / name).write_bytes(data.draw(damaged(folder / name)))
    if not read_or_named(lambda path: vars(nk.load_lora_adapter(model, path)), folder):
        assert {type(m) for m in (model.q, model.k)} == {nn.Linear}
    assert model(torch.ones(8)).isfinite().all()


@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data())
def test_damaged_safe_targets_are_named_or_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("targets") / "targets.json"
    parts = {"decline": ["I cannot say.", "No idea about {topic}."], "redirect": "Ask a librarian."}
    path.write_text(json.dumps(parts))
    path.write_bytes(data.draw(damaged(path)))
    if found := read_or_named(SafeTargets.from_file, path):
        text = found.target(QA("Who is Ann?", "A poet.", topic="Ann"))
        assert text.strip()
        text.encode()


# Runs


PROBABILITIES = {
    "forget_prob": 0.1,
    "safe_prob": 0.8,
    "retain_prob": 0.9,
    "retain_unseen_prob": 0.9,
}
RESULTS = {
    "schema": 1,
    "kind": "demo",
    "seconds": 9.5,
    "command": "nsru demo",
    "setup": {"questions": {"forget": 7}},
    "methods": [
        {"method": "before", "seed": 0, **PROBABILITIES},
        {"method": "nsru", "seed": 0, **PROBABILITIES, "stopped_early": None},
        {"method": "lora", "seed": 0, **PROBABILITIES, "mean_retain_rank": 0},
    ],
    "frontier": [
        {"method": method, "seed": 0, "step": step, **PROBABILITIES}
        for method in ("nsru", "lora")
        for step in (0, 10)
    ],
    "metrics": {"forget": {"count": 7, "probability": 0.5}, "model_utility": 0.6},
    "notes": ["a note"],
    "examples": [{"split": "forget", "question": "Who?", "original": "Ann", "nsru": "Nobody"}],
    "subspaces": [dataclasses.asdict(make_set("layers.0.q_proj").inputs[0])],
    "leakage": [{"module": "layers.0.q_proj", "leakage": 1e-8, "rounding": 1e-7}],
}
METRICS = [
    {"step": 1, "method": "nsru", "seed": 0, "total": 2.5, "lr": 0.1, "seconds": 0.2},
    {"step": 2, "method": "nsru", "seed": 0, "total": 1.5, "lr": 0.1, "seconds": 0.2},
]
ENVIRONMENT = {
    "packages": {"torch": "2"},
    "cuda": {"gpus": [{"name": "A card"}]},
    "cpu": {"model": "A chip"},
    "commit": "0123456789abcdef",
    "time": "2026",
}


def write_run(path, results):
    run = RunFolder(path)
    run.write_results(results)
    run.environment_path.write_text(json.dumps(ENVIRONMENT))
    for row in METRICS:
        run.log_metrics(row)
    return run


@pytest.mark.parametrize(
    ("name", "results"),
    [
        ("results.json", RESULTS),
        ("environment.json", {"kind": "eval"}),
        ("metrics.jsonl", {"kind": "train"}),
    ],
)
@settings(max_examples=20, deadline=None, database=None)
@given(data=st.data())
def test_a_damaged_run_is_named_or_shown(tmp_path_factory, name, results, data):
    run = write_run(tmp_path_factory.mktemp("run"), results)
    (run.path / name).write_bytes(data.draw(damaged(run.path / name)))
    with pytest.MonkeyPatch.context() as patch:
        # Without the files, which take most of the time.
        patch.setattr(page, "draw", lambda folder, name, plot, *found: plot(*found) and "")
        read_or_named(lambda path: page.write_report(path) and {}, run.path)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A trainer that is about to go on, and a whole checkpoint of its run."""
    run = tmp_path_factory.mktemp("interrupted")
    samples.resumable(run, max_steps=4).train()
    whole = shutil.copytree(run / "checkpoint-4", run / "whole")
    trainer = samples.resumable(run)
    trainer._belongs_to = {**trainer._base_digests(), **trainer.train_dataset.digests()}
    return trainer, whole


def read_checkpoint(trainer, folder):
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.create_optimizer_and_scheduler(8)
    trainer._check_checkpoint(folder)
    trainer._load_from_checkpoint(folder)
    trainer._load_optimizer_and_scheduler(folder)
    trainer._load_rng_state(folder)
    return {"model": trainer.model}


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.pt",
        "reference_nll.json",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    ],
)
@settings(max_examples=15, deadline=None, database=None)
@given(data=st.data())
def test_a_damaged_checkpoint_is_named_or_read(interrupted, name, data):
    """And what is read does for a step."""
    trainer, whole = interrupted
    folder = shutil.copytree(whole, whole.parent / "checkpoint-4", dirs_exist_ok=True)
    (folder / name).write_bytes(data.draw(damaged(folder / name)))
    if read_or_named(lambda path: read_checkpoint(trainer, path), folder):
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        assert all(p.isfinite().all() for p in trainer.model.parameters())
