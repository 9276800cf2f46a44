"""An exported adapter gives our greedy answers by other ways of serving it."""

import json

import torch
from samples import save_tiny
from torch import nn

import nsru_kernels as nk
from nsru_bench import serving
from nsru_train.data.records import QA
from nsru_train.sources import save_records

SETS = {
    "forget": [QA("Where was Ines Karvonen born?", "In Lunde."), QA("Who wrote?", "Ines.")],
    "retain": [QA("Where was Tomas Abelard born?", "In Vire.")],
}


def test_peft_and_transformers_answer_word_for_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serving, "find_spec", lambda name: None if name == "vllm" else name)
    model, _ = save_tiny(tmp_path / "base", [qa for qas in SETS.values() for qa in qas], 320)
    nk.swap_linears(model, "all-linear", rank=2, alpha=3.5)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nk.NSRULinear):
            nn.init.normal_(module.lora_B, std=0.5)
    nk.save_lora_adapter(model, tmp_path / "adapter")
    for name, records in SETS.items():
        save_records(tmp_path / f"{name}.jsonl", records)
    files = [tmp_path / f"{name}.jsonl" for name in SETS]
    out = tmp_path / "new" / "result.json"
    given = [tmp_path / "base", tmp_path / "adapter", *files, "--max-new-tokens", 12, "--out", out]
    serving.main(list(map(str, given)))
    result = json.loads(out.read_text())
    ways = result["ways"]
    assert list(ways) == ["no adapter", "load_lora_adapter", "peft", "transformers"]
    for name, records in SETS.items():
        assert ways["no adapter"][name]["word_for_word"] == 0, "the adapter does something"
        for way in ("peft", "transformers"):
            assert ways[way][name] == ways["load_lora_adapter"][name]
            assert ways[way][name]["word_for_word"] == len(records)
    assert not any(qa.question in out.read_text() for records in SETS.values() for qa in records)
    assert "transformers       forget 2/2, retain 1/1" in capsys.readouterr().out
