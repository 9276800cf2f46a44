"""The README's example runs."""

import re
from pathlib import Path

from samples import RECORDS, save_tiny

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_example_runs_as_written(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 15
    save_tiny(tmp_path / "my-model", RECORDS, layers=1, heads=2, kv_heads=1)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    moved = [p for p in names["model"].parameters() if p.requires_grad and p.grad is not None]
    assert any(p.grad.abs().sum() > 0 for p in moved)
