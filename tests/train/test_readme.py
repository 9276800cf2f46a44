"""The README's example runs."""

import re
from pathlib import Path

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
