"""RetainSubspace and SubspaceSet: truncation, files, fingerprints."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from torch import nn

from nsru_kernels.subspaces import InputDiagnostics, RetainSubspace, SubspaceSet
from nsru_kernels.subspaces.collection import fingerprint_weights


def make_subspace(k=12, eigenvalues=(4.0, 3.0, 2.0), trace=10.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(k, len(eigenvalues), generator=generator)).Q
    return RetainSubspace(basis, torch.tensor(eigenvalues).double(), trace=trace, tokens=77)


def make_set(model, **names):
    inputs, subspaces = [], {}
    for seed, (name, modules) in enumerate(names.items()):
        subspace = make_subspace(seed=seed)
        modules = [name, *modules]
        subspaces.update(dict.fromkeys(modules, subspace))
        inputs.append(
            InputDiagnostics(name, modules, 12, 3, 0.9, 0.25, seed == 1, 77, [0.4, 0.3, 0.2])
        )
    return SubspaceSet(subspaces, inputs, fingerprint_weights(model))


def assert_equal(one, other):
    assert torch.equal(one.basis, other.basis)
    assert torch.equal(one.eigenvalues, other.eigenvalues)
    assert one.basis.dtype == torch.float32
    for name in ("trace", "tokens", "rank_limited", "captured_energy"):
        assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize(
    ("request_", "rank", "limited"),
    [
        ({"rank": 0}, 0, False),
        ({"rank": 2}, 2, False),
        ({"rank": 3}, 3, False),
        ({"rank": 4}, 3, True),
        ({"energy": 0.3}, 1, False),
        ({"energy": 0.4}, 1, False),
        ({"energy": 0.41}, 2, False),
        ({"energy": 0.9}, 3, False),
        ({"energy": 0.95}, 3, True),
    ],
)
def test_truncate(request_, rank, limited):
    whole = make_subspace()
    part = whole.truncate(**request_)
    assert (part.rank, part.rank_limited) == (rank, limited)
    assert part.captured_energy == pytest.approx(sum((4, 3, 2)[:rank]) / 10)
    assert torch.equal(part.basis, whole.basis[:, :rank])
    # Its own memory: the full-width basis can be freed.
    assert part.basis.untyped_storage().nbytes() == 12 * rank * 4


@pytest.mark.parametrize(
    "request_", [{}, {"rank": 1, "energy": 0.5}, {"rank": -1}, {"energy": 0.0}, {"energy": 1.5}]
)
def test_truncate_refuses(request_):
    with pytest.raises(ValueError, match="truncate"):
        make_subspace().truncate(**request_)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"basis": torch.zeros(12)}, r"\[K, Q\]"),
        ({"basis": torch.zeros(2, 3)}, r"\[K, Q\]"),
        ({"eigenvalues": torch.zeros(2)}, r"\[Q=3\]"),
        ({"basis": torch.full((12, 3), torch.nan)}, "basis .* holds NaN"),
        ({"basis": 2 * torch.eye(12, 3)}, "orthonormal columns.*singular value of 2;"),
        ({"basis": torch.eye(12, 1).repeat(1, 3)}, "orthonormal columns"),
        ({"eigenvalues": torch.full((3,), torch.inf)}, "eigenvalues has NaN"),
    ],
)
def test_construction_refuses(change, match):
    arguments = {"basis": torch.zeros(12, 3), "eigenvalues": torch.zeros(3)}
    with pytest.raises(ValueError, match=match):
        RetainSubspace(**(arguments | change), trace=1.0, tokens=1)


def test_file_round_trip(tmp_path):
    for name, subspace in (
        ("plain", make_subspace(trace=28 / 3)),
        ("limited", make_subspace().truncate(rank=5)),
        ("empty", make_subspace().truncate(rank=0)),
    ):
        path = tmp_path / name
        subspace.save(path)
        assert_equal(RetainSubspace.load(path), subspace)
    assert len(list(tmp_path.iterdir())) == 3


def test_truncated_file_is_refused(tmp_path):
    path = tmp_path / "subspace.safetensors"
    make_subspace().save(path)
    content = path.read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{length} bytes.*truncated"):
            RetainSubspace.load(path)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"basis": torch.zeros(3, 1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="not a retain subspace"):
        RetainSubspace.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        RetainSubspace.load(tmp_path / "absent")


def test_full_disk_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "subspace.safetensors"
    first = make_subspace()
    first.save(path)

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        make_subspace(seed=1).save(path)
    assert os.listdir(tmp_path) == [path.name]
    assert_equal(RetainSubspace.load(path), first)


def test_set_round_trip(tmp_path):
    model = nn.Linear(12, 12)
    subspaces = make_set(model, q_proj=["k_proj"], down_proj=[])
    for _ in range(2):  # the second save replaces the first
        subspaces.save(tmp_path / "subspaces")
    assert sorted(os.listdir(tmp_path)) == ["subspaces"]
    # One file per distinct input.
    assert len(list((tmp_path / "subspaces").glob("*.safetensors"))) == 2
    loaded = SubspaceSet.load(tmp_path / "subspaces")
    assert list(loaded) == list(subspaces)
    assert loaded["k_proj"] is loaded["q_proj"]
    assert loaded["down_proj"] is not loaded["q_proj"]
    for name, subspace in subspaces.items():
        assert_equal(loaded[name], subspace)
    assert loaded.inputs == subspaces.inputs
    assert loaded.table() == subspaces.table()
    loaded.check_model(model)


def test_table_marks_what_ran_out_of_width():
    lines = make_set(nn.Linear(2, 2), q_proj=["k_proj"], down_proj=[]).table().splitlines()
    assert lines[0].split() == [
        "input", "modules", "K", "rank", "captured", "editability", "separation", "tokens",
    ]  # fmt: skip
    assert lines[1].split() == ["q_proj", "2", "12", "3", "90.00%", "25.00%", "2.5", "77"]
    assert lines[2].split()[3] == "3*"
    assert "raise width" in lines[3]


def test_a_short_table_says_in_what_range_all_are():
    found = make_set(nn.Linear(2, 2), q_proj=[], down_proj=[], up_proj=[])
    assert found.table(most=3) == found.table()
    found.inputs[2].rank, found.inputs[2].editability = 7, None
    lines = found.table(most=1).splitlines()
    words = [line.split() for line in found.table().splitlines()]
    assert [line.split() for line in lines[:2]] == words[:2]
    assert lines[2] == (
        "… and 2 more. All: rank 3 to 7, captured 90.00% to 90.00%, editability 25.00% to 25.00%, "
        "separation 2.5 to 2.5."
    )
    assert found.inputs[2].separation is None
    found.inputs[0].captured_energy = 1.0
    assert found.inputs[0].separation == pytest.approx(2500)


def test_table_tells_little_data_from_a_narrow_sketch():
    found = make_set(nn.Linear(2, 2), q_proj=[], down_proj=[])
    found.inputs[1].captured_energy = 0.9999
    *_, last = found.table().splitlines()
    assert last.startswith("* all that the retain data has there is protected")
    found.inputs[0].rank_limited = True
    assert "raise width" in found.table().splitlines()[-1]


def test_damaged_folders_are_refused(tmp_path):
    folder = tmp_path / "subspaces"
    subspaces = make_set(nn.Linear(2, 2), q_proj=[])
    subspaces.save(folder)
    index = (folder / "index.json").read_text()
    (folder / "index.json").write_text(index[:-20])
    with pytest.raises(ValueError, match="damaged"):
        SubspaceSet.load(folder)
    (folder / "index.json").write_text(json.dumps(json.loads(index) | {"schema": 2}))
    with pytest.raises(ValueError, match="schema 1"):
        SubspaceSet.load(folder)
    (folder / "index.json").write_text(index)
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="missing"):
        SubspaceSet.load(folder)


def test_save_never_replaces_a_foreign_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="other files"):
        make_set(nn.Linear(2, 2), q_proj=[]).save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "keep"


def test_failed_save_leaves_the_previous_folder(tmp_path, monkeypatch):
    folder = tmp_path / "subspaces"
    first = make_set(nn.Linear(2, 2), q_proj=[])
    first.save(folder)

    def no_space(self, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RetainSubspace, "save", no_space)
    with pytest.raises(OSError, match="No space"):
        make_set(nn.Linear(2, 2), q_proj=[], down_proj=[]).save(folder)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["subspaces"]
    assert list(SubspaceSet.load(folder)) == ["q_proj"]


def test_fingerprint_tells_models_apart():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    same = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    same.load_state_dict(model.state_dict())
    found = fingerprint_weights(model)
    assert fingerprint_weights(same) == found
    assert fingerprint_weights(same.bfloat16()) == found
    subspaces = make_set(model, q_proj=[])
    with torch.no_grad():
        model[1].weight *= 1.01
    with pytest.raises(ValueError, match="estimate the subspaces again"):
        subspaces.check_model(model)


@pytest.mark.parametrize("edited", [(slice(None), slice(128, None)), (slice(128, None),)])
def test_fingerprint_sees_rows_and_columns_of_a_large_matrix(edited):
    model = nn.Linear(1024, 1024)
    found = fingerprint_weights(model)
    with torch.no_grad():
        model.weight[edited] = 0
    assert fingerprint_weights(model) != found
