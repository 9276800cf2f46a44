"""RunFolder: nothing half-written is ever visible, and what is read back is what was written."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import yaml

from nsru_train import run_folder
from nsru_train.run_folder import RunFolder, atomic_write, git_commit, to_json


def test_atomic_write_replaces_bytes_and_text(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    assert atomic_write(path, "grün") == path
    assert path.read_text(encoding="utf-8") == "grün"
    atomic_write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_failed_write_keeps_the_previous_file(tmp_path):
    """A real failing write: the file size limit of a child process is below the new content."""
    path = tmp_path / "results.json"
    path.write_text("previous")
    child = textwrap.dedent(
        f"""
        import resource, signal
        from nsru_train.run_folder import atomic_write
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            atomic_write({str(path)!r}, b"x" * 100_000)
        except OSError as error:
            print(error)
        """
    )
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert "the previous file was kept" in done.stdout
    assert str(path) in done.stdout
    assert path.read_text() == "previous"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_disk_full_on_flush_is_named_and_cleaned_up(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device; nothing was written") as raised:
        atomic_write(tmp_path / "a.json", "{}")
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "a.json", "{}")
    assert list(tmp_path.iterdir()) == []


def test_to_json_is_standard_json(tmp_path):
    row = {
        "nan": float("nan"),
        "inf": -float("inf"),
        "t": torch.tensor(1.5),
        "p": tmp_path,
        3: (1,),
    }
    read = json.loads(to_json(row), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert read == {"nan": None, "inf": None, "t": 1.5, "p": str(tmp_path), "3": [1]}
    assert json.loads(to_json(torch.tensor([1.0, float("nan")]))) == [1.0, None]
    with pytest.raises(TypeError, match="cannot write a set"):
        to_json({"a": {1, 2}})


def test_config_and_results_round_trip(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.write_config({"rank": 8, "adapter": {"targets": ("q_proj",)}, "a": None})
    config = yaml.safe_load(run.config_path.read_text())
    assert config == {"rank": 8, "adapter": {"targets": ["q_proj"]}, "a": None}
    assert list(config) == ["rank", "adapter", "a"]
    run.write_results({"kind": "demo", "seconds": 1.0})
    assert run.read_results() == {"schema": 1, "kind": "demo", "seconds": 1.0}


def test_metrics_survive_a_line_cut_off_by_a_kill(tmp_path):
    run = RunFolder(tmp_path)
    assert run.read_metrics() == []
    run.log_metrics({"step": 1, "loss": 2.0})
    with open(run.metrics_path, "ab") as file:
        file.write(b'{"step": 2, "lo')
    run.log_metrics({"step": 2, "loss": 1.0})
    assert run.read_metrics() == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        (None, FileNotFoundError, "has not finished"),
        ('{"schema": 1, "met', ValueError, "not valid JSON"),
        ('{"schema": 7}', ValueError, "expected schema 1, got 7"),
        ("[]", ValueError, "expected schema 1, got None"),
    ],
)
def test_read_results_explains(tmp_path, content, error, match):
    run = RunFolder(tmp_path)
    if content is not None:
        run.results_path.write_text(content)
    with pytest.raises(error, match=match):
        run.read_results()


def test_a_file_is_not_a_run_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(tmp_path / "f")


def test_environment_has_versions_and_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "git_commit", lambda: "abc-dirty")
    run = RunFolder(tmp_path)
    run.write_environment()
    environment = json.loads(run.environment_path.read_text())
    assert environment["commit"] == "abc-dirty"
    assert torch.__version__ in run.environment_path.read_text()


def test_git_commit_marks_changes(tmp_path):
    assert git_commit(tmp_path) is None

    def git(*args):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-m", "one")
    commit = git_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "f").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"


def test_links_out_of_a_run_are_not_followed(tmp_path):
    other, run = tmp_path / "other", RunFolder(tmp_path / "run")
    other.mkdir()
    (run.path / "eval").symlink_to(other)
    RunFolder(run.path / "eval")  # no run yet, whose own folder this could be
    run.write_config({})
    with pytest.raises(ValueError, match=r"run/eval is a link to .*other, .*; remove it"):
        RunFolder(run.path / "eval")
    (run.path / "figures").symlink_to(other)
    with pytest.raises(ValueError, match=r"run/figures is a link to"):
        RunFolder(run.path)
    (run.path / "figures").unlink()
    (tmp_path / "link").symlink_to(run.path)
    RunFolder(tmp_path / "link")
