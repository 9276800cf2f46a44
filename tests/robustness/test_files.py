"""Files that anyone may have made: nothing outside their folder is touched, nothing odd believed."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nsru_kernels.subspaces import InputDiagnostics, RetainSubspace, SubspaceSet

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


@pytest.mark.parametrize("changes", [{"inputs": {}}, {"inputs": ["q_proj"]}, {"fingerprint": 7}])
def test_the_head_of_the_index_is_checked(tmp_path, changes):
    make_set("q_proj").save(tmp_path)
    edit_json(tmp_path / "index.json", **changes)
    with pytest.raises(ValueError, match=r"index\.json: (inputs|fingerprint) must be"):
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
