"""A target that was trained elsewhere: how it is made, and the demo on it."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nsru_bench import scale
from nsru_train import compare
from nsru_train.cli import main
from nsru_train.compare import best_lr
from nsru_train.demo import run, smollm2
from nsru_train.demo.authors import author_splits
from nsru_train.demo.sets import target_sets
from nsru_train.demo.tiny_model import make_llama, train_tokenizer

pytestmark = pytest.mark.usefixtures("short_answers", "module_without_figures")


@pytest.fixture(scope="module")
def groups():
    splits = author_splits(authors=3, forget=1)
    retain = list(splits.retain)
    return {
        "forget": list(splits.forget)[:6],
        "retain": retain[:8],
        "retain_unseen": retain[8:],
        "world_facts": list(splits.holdout)[:4],
    }


@pytest.fixture(scope="module")
def out(tmp_path_factory, groups):
    folder = tmp_path_factory.mktemp("smollm2")
    texts = [f"{qa.question} {qa.answer}" for records in groups.values() for qa in records]
    tokenizer = train_tokenizer(texts, 400)
    make_llama(tokenizer, hidden_size=32, layers=1, intermediate_size=48).save_pretrained(
        folder / "base"
    )
    tokenizer.save_pretrained(folder / "base")
    smollm2.train_target(folder, groups)
    return folder


def test_target_has_learnt_and_holds_its_questions(out, groups):
    assert target_sets(str(out / "target")).authors.keys() == {"forget", "retain", "retain_unseen"}
    assert target_sets(str(out / "target")).general == {"world_facts": groups["world_facts"]}
    before, after = (load_file(out / name / "model.safetensors") for name in ("base", "target"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert not (out / "target.checkpoint").exists()


def test_the_base_alone_needs_no_questions(out, tmp_path, monkeypatch, capsys):
    shutil.copytree(out / "base", tmp_path / "base")
    monkeypatch.setattr(smollm2, "tofu_groups", None)
    monkeypatch.setattr("sys.argv", ["smollm2", "--base-only", f"--out={tmp_path}"])
    smollm2.main()
    _, command = capsys.readouterr().out.split("next:\n")
    quickstart = Path(__file__).parents[2].joinpath("docs/index.md").read_text()
    assert command.replace(str(tmp_path), "runs/smollm2") in quickstart
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_missing_package_is_named_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    monkeypatch.setattr(smollm2.subprocess, "run", None)
    with pytest.raises(ImportError, match="pip install 'gguf"):
        smollm2.make_base(tmp_path)


def test_a_file_that_is_here_is_taken_without_a_download(out, tmp_path, monkeypatch):
    asked = []

    def load(folder, *, gguf_file, dtype):
        asked.append(Path(folder, gguf_file))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out / "base"))
        model.config.quantization_config = {"quant_method": "gguf"}
        return model.to(dtype)

    monkeypatch.setattr(smollm2, "find_spec", lambda name: True)
    monkeypatch.setattr(smollm2.subprocess, "run", None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)

    def load_tokenizer(folder, *, gguf_file):
        tokenizer = train_tokenizer(["a"], 300)
        tokenizer.eos_token, tokenizer.pad_token = tokenizer.bos_token, None
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load_tokenizer)
    gguf = tmp_path / "own.gguf"
    monkeypatch.setattr(
        "sys.argv", ["smollm2", "--base-only", f"--out={tmp_path}", f"--gguf={gguf}"]
    )
    with pytest.raises(ValueError, match=r"gguf: expected the file SmolLM2.*own\.gguf"):
        smollm2.main()
    gguf.touch()
    smollm2.main()
    assert asked == [gguf]
    config, tokens = (
        json.loads((tmp_path / "base" / f"{name}config.json").read_text())
        for name in ("", "tokenizer_")
    )
    assert "quantization_config" not in config
    assert (tokens["eos_token"], tokens["pad_token"]) == ("</s>", "<pad>"), "as the model's config"


def test_the_target_is_trained_on_the_default_device(out, groups, tmp_path, monkeypatch):
    shutil.copytree(out / "base", tmp_path / "base")
    where = set()

    def killed(model, batch):
        where.update(tensor.device.type for tensor in (*model.parameters(), *batch.values()))
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "default_device", lambda: torch.device("meta"))
    monkeypatch.setattr(smollm2, "_answer_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        smollm2.train_target(tmp_path, groups)
    assert where == {"meta"}


def test_a_killed_training_goes_on_to_the_same_weights(out, groups, tmp_path, monkeypatch):
    shutil.copytree(out / "base", tmp_path / "base")
    monkeypatch.setattr(smollm2, "CHECKPOINT_STEPS", 4)
    whole, calls = smollm2._answer_loss, []

    def killed(model, batch):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return whole(model, batch)

    monkeypatch.setattr(smollm2, "_answer_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        smollm2.train_target(tmp_path, groups)
    assert not (tmp_path / "target").exists()
    smollm2.train_target(tmp_path, groups)
    # 3 batches of 22 questions an epoch: seven calls, then all but the first four steps.
    assert len(calls) == 7 + 3 * smollm2.EPOCHS - 4
    ours, theirs = (load_file(f / "target" / "model.safetensors") for f in (tmp_path, out))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=0)


def demo(out, folder, *more, seeds=2, lrs="[1e-3,1e-2]"):
    main(
        [
            "demo", f"--model={out / 'target'}", f"--out={folder}", f"--seeds={seeds}",
            f"--lrs={{nsru: {lrs}, lora: {lrs}}}", "--train.steps=4", "--train.warmup=0",
            "--examples=2", "--probed=4", *more,
        ]
    )  # fmt: skip
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def results(out, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)  # so that a relative name is gone on with
        return {**demo(out, Path(folder.name)), "folder": folder}


def test_demo_tries_every_rate_and_keeps_one_for_all_seeds(results):
    tried = {(row["method"], row["lr"], row["seed"]) for row in results["tuning"]}
    assert tried == {(m, lr, 0) for m in ("nsru", "lora") for lr in (1e-3, 1e-2)}
    for row in results["methods"][1:]:
        assert row["lr"] == results["setup"]["lr"][row["method"]]
    assert {(row["method"], row["seed"]) for row in results["frontier"]} == {
        (method, seed) for method in ("nsru", "lora") for seed in (0, 1)
    }


def test_demo_shows_general_knowledge(results):
    for row in results["methods"]:
        assert 0 <= row["world_facts_exact_memorisation"] <= 1
    assert results["setup"]["questions"]["world_facts"] == 4


def test_an_interrupted_demo_goes_on(out, results, monkeypatch):
    folder, lost = results["folder"], ["nsru-0.001-0", "lora-0.01-0"]
    (folder / "results.json").unlink()
    for run_of_one in lost:
        shutil.rmtree(folder / "runs" / run_of_one)
    trained = []
    whole = compare.unlearn
    monkeypatch.setattr(
        compare, "unlearn", lambda *args, **kw: trained.append(args[3]) or whole(*args, **kw)
    )
    monkeypatch.chdir(folder.parent)
    again = demo(out, Path(folder.name), "--resume=true")
    assert [path.name for path in trained] == lost
    for rows in ("tuning", "frontier"):
        assert again[rows] == results[rows], "as if nothing had happened"


def test_an_interrupted_demo_with_other_settings_is_refused(out, results, capsys):
    folder = results["folder"]
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(SystemExit):
        demo(out, folder, "--resume=true", "--train.steps=5")
    assert "train.steps was 4 and is 5" in capsys.readouterr().err
    assert (folder / "config.yaml").read_bytes() == before


def test_a_run_stops_where_it_has_forgotten_enough(out, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "FICTITIOUS", replace(run.FICTITIOUS, eval_steps=2))
    once = {"seeds": 1, "lrs": "[1e-2]"}
    found = demo(out, tmp_path / "early", "--stop=0.9999", **once)
    assert {row["step"] for row in found["frontier"]} == {0, 2}
    found = demo(out, tmp_path / "late", "--stop=1e-9", **once)
    assert {row["step"] for row in found["frontier"]} == {0, 2, 4}


def test_a_folder_without_questions_is_refused(out):
    with pytest.raises(ValueError, match=r"has no forget.jsonl.*make smollm2"):
        target_sets(str(out / "base"))


def test_best_rate_forgets_enough_and_harms_least():
    def point(lr, forget, unseen):
        return {"method": "nsru", "lr": lr, "forget_prob": forget, "retain_unseen_prob": unseen}

    points = [point(1, 0.5, 0.99), point(2, 0.08, 0.9), point(3, 0.05, 0.95), point(3, 0.01, 0.8)]

    def enough(found):
        return found["forget_prob"] <= 0.1

    assert best_lr(points, "nsru", enough) == 3
    assert best_lr([*points[:1], point(4, 0.4, 0.2)], "nsru", enough) == 4


def test_scale_tells_who_holds_the_energy_and_what_a_step_does(out, tmp_path):
    scale.main([f"--model={out / 'target'}", "--layers=0", "--questions=12", f"--out={tmp_path}"])
    energy, rules, steps = (
        list(csv.DictReader((tmp_path / f"scale_{name}.csv").open(newline="")))
        for name in ("energy", "rules", "steps")
    )
    by_input = {}
    for row in energy:
        by_input[row["input"]] = by_input.get(row["input"], 0) + float(row["energy"])
    assert list(by_input.values()) == pytest.approx([1.0] * 7, abs=1e-5)
    for row in rules:
        assert float(row["editability"]) >= float(row["floor"]) or row["rank"] == "1"
        if row["rule"] == "unit answers":  # measured once more, by another way
            assert float(row["forget_open"]) == pytest.approx(float(row["editability"]), abs=1e-3)
    plain, *projected = steps
    assert plain["rule"] == "none"
    whole = {row["floor"]: row for row in projected if row["power"] == "0.0"}
    for row in projected:
        assert float(row["forget_change"]) >= float(whole[row["floor"]]["forget_change"]) * 0.99
    assert (tmp_path / "scale.png").stat().st_size > 10_000
