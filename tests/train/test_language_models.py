"""Models that are no causal language models go through the commands as those do."""

import json

import architectures
import pytest
from samples import FORGET, RETAIN, make_tokenizer

import nsru_kernels as nk
from nsru_train.cli import main
from nsru_train.language_models import load_language_model
from nsru_train.sources import save_records

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(params=["llava", "qwen2_vl"])
def base(request, tmp_path, monkeypatch):
    """A folder of a tiny model of this kind, and its class."""
    tokenizer = make_tokenizer()
    sizes = {**architectures.SIZES, "vocab_size": len(tokenizer) + 1, "initializer_range": 0.1}
    monkeypatch.setattr(architectures, "SIZES", sizes)
    options = architectures.FAMILIES[request.param]
    if "text_config" in options:
        text = {**options["text_config"], **sizes}
        token = {f"image_token_{end}": len(tokenizer) for end in ("id", "index")}
        monkeypatch.setitem(
            architectures.FAMILIES, request.param, {**options, **token, "text_config": text}
        )
    model = architectures.make(request.param)
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 28}')
    return folder, type(model)


def test_train_eval_merge_verify(base, tmp_path, capsys):
    folder, kind = base
    for name, records in (("forget", FORGET), ("retain", RETAIN)):
        save_records(tmp_path / f"{name}.jsonl", records)
    run = tmp_path / "run"
    main(
        ["train", f"--model.path={folder}", f"--out={run}", "--subspace.rank=4"]
        + [f"--data.{name}={tmp_path / name}.jsonl" for name in ("forget", "retain")]
        + ["--lora.rank=2", "--train.steps=8", "--train.lr=0.02", "--train.batch_size=3"]
        + ["--objective.w_suppress=1", "--objective.suppression=npo"]
    )
    said = capsys.readouterr().out
    assert "(outside of the text part; name it to swap it)" in said
    targets = json.loads((run / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) == 14
    assert all(".language_model." in name for name in targets)
    main(["eval", str(run), "--max_new_tokens=4"])
    main(["merge", str(run)])
    main(["verify", str(run)])
    said = capsys.readouterr().out
    assert "ok    forgotten answers less probable" in said
    assert "ok    merged model" in said
    merged = load_language_model(run / "merged")
    assert type(merged) is kind
    assert not any(isinstance(module, nk.NSRULinear) for module in merged.modules())
    assert (run / "merged" / "preprocessor_config.json").read_text() == '{"size": 28}'
