"""The README's example and its tables say what is true."""

import re
from pathlib import Path

import pytest

from nsru_kernels import dispatch
from nsru_train.cli import COMMANDS
from nsru_train.demo.tiny_model import make_llama, train_tokenizer

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_example_runs_as_written(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 15
    tokenizer = train_tokenizer(["What must stay.", "What must go.", "What must be."], 270)
    model = make_llama(
        tokenizer, hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=48
    )
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    moved = [p for p in names["model"].parameters() if p.requires_grad and p.grad is not None]
    assert any(p.grad.abs().sum() > 0 for p in moved)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_backend_table_says_what_explain_says(op):
    (row,) = [line for line in README.splitlines() if line.startswith("| [`") and f"`{op}`" in line]
    for backend, cell in zip(("cpu", "triton", "cuda"), row.split(" | ")[2:], strict=True):
        status = dispatch.KERNELS.get((dispatch.OPS[op], backend), "library GEMMs")
        for words in (
            "library GEMMs",
            "run on one kind of Intel Xeon with AMX, up to two threads",
            "interpreted",
            "emulated",
            "sm_80",
            "sm_90",
            "not run",
        ):
            if words.startswith("sm_") and backend == "triton":
                continue  # said once, below the table
            assert (words in cell) == (words in status), f"{op}, {backend}: {words}"


def test_environment_variables_are_listed():
    for name in ("BACKEND", "AUTOTUNE", "SKIP_CUDA", "SKIP_CPU", "CUDA_ARCHS", "TEST_DATA"):
        assert re.search(rf"^\|[^|]*`NSRU_{name}", README, re.MULTILINE), name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_listed(command):
    assert f"| `nsru {command}" in README
