"""Refresh and rollback of a finished run: what starts where, what is undone, what stays."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from samples import save_tiny

import nsru_kernels as nk
from nsru_kernels.hf.peft_format import copy_lora_adapter, load_lora_adapter
from nsru_train.cli import main
from nsru_train.config import DataConfig, ModelConfig
from nsru_train.demo.authors import author_splits
from nsru_train.loading import load_data, load_model
from nsru_train.losses.nll import answer_nll
from nsru_train.pipeline import token_batches
from nsru_train.repair import FinishedRun, diagonal_fisher
from nsru_train.sources import load_records, save_records

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of few steps on a random model."""
    folder = tmp_path_factory.mktemp("run")
    splits = author_splits(authors=4, forget=1)
    save_tiny(folder / "model", (*splits.forget, *splits.retain), heads=2, kv_heads=1)
    for name in ("forget", "retain"):
        save_records(folder / f"{name}.jsonl", getattr(splits, name)[:6])
    main([
        "train", f"--model.path={folder / 'model'}", f"--data.forget={folder / 'forget.jsonl'}",
        f"--data.retain={folder / 'retain.jsonl'}", "--method=graddiff", "--train.steps=6",
        "--train.lr=0.02", "--train.batch_size=3", f"--out={folder / 'nsru'}",
    ])  # fmt: skip
    return folder / "nsru"


def model_of(run, adapter=None):
    model, tokenizer = load_model(ModelConfig(str(run.parent / "model")))
    load_lora_adapter(model, adapter or run / "adapter")
    return model, tokenizer


def digests(folder, *without):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not set(path.relative_to(folder).parts) & {*without, ".lock"}
    }


def rows_of(folder):
    results = json.loads((folder / "results.json").read_text())
    return {row["method"]: row for row in results["methods"]}, results


def test_a_refresh_goes_on_from_the_run_in_its_null_space(run):
    untouched = digests(run)
    main(["refresh", str(run), "--steps=8", "--eval_steps=4", "--lr=0.02"])
    assert digests(run, "refresh") == untouched
    rows, results = rows_of(run / "refresh")
    after = rows_of(run)[0]["graddiff projected"]
    for name in ("forget_prob", "retain_prob", "safe_prob"):
        assert rows["unlearned"][name] == pytest.approx(after[name], rel=1e-4)
        assert rows["before"][name] == pytest.approx(rows_of(run)[0]["before"][name], rel=1e-5)
    assert rows["refreshed"]["retain_prob"] > 1.02 * rows["unlearned"]["retain_prob"]
    assert rows["continued"]["forget_prob"] < rows["refreshed"]["forget_prob"]
    assert {(p["method"], p["step"]) for p in results["frontier"]} == {
        (name, step) for name in ("refreshed", "continued") for step in (0, 4, 8)
    }
    assert 0 < max(row["leakage"] for row in results["leakage"]) < 1e-6
    saved = load_file(run / "refresh" / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(run / "adapter" / "adapter_model.safetensors").items():
        assert not torch.equal(saved[name], tensor), name
    with pytest.raises(SystemExit):
        main(["refresh", str(run)])


def test_a_rollback_undoes_the_costliest_entries(run):
    untouched = digests(run, "refresh")
    main(["rollback", str(run), "--shares=[0.01, 1.0]", "--items=3", "--seed=4"])
    assert digests(run, "refresh", "rollback") == untouched
    rows, results = rows_of(run / "rollback")
    for share in ("rolled back 1", "random 1"):  # nothing of the update is left
        assert rows[share]["forget_prob"] == pytest.approx(rows["before"]["forget_prob"], rel=1e-5)
    count = rows["rolled back 0.01"]["entries"]
    assert rows["random 0.01"]["entries"] == count == round(0.01 * results["setup"]["entries"])

    model, tokenizer = model_of(run)
    retain = load_data(DataConfig(*(str(run.parent / f"{n}.jsonl") for n in ("forget", "retain"))))
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randperm(len(retain.retain), generator=generator)[:3].tolist()
    factors = {n: p for n, p in model.named_parameters() if n.endswith("lora_B")}
    fisher = {name: torch.zeros_like(p) for name, p in factors.items()}
    for i in drawn:
        batches = token_batches(model, tokenizer, [retain.retain[i]], max_tokens=99, max_length=512)
        model.zero_grad()
        answer_nll(model, batches[0])[0].mean().backward()
        for name, p in factors.items():
            fisher[name] += p.grad.square() / 3
    cost = torch.cat([(0.5 * fisher[n] * p.detach() ** 2).flatten() for n, p in factors.items()])
    undone = torch.zeros(len(cost), dtype=torch.bool)
    undone[cost.topk(count).indices] = True
    expected = torch.where(undone, 0, torch.cat([p.detach().flatten() for p in factors.values()]))
    rolled, _ = model_of(run, run / "rollback" / "adapters" / "rolled-back-0.01")
    found = torch.cat([p.detach().flatten() for n, p in rolled.named_parameters() if "lora_B" in n])
    # B is rounded on its way to the one alpha of a folder and back.
    differ = ~torch.isclose(found, expected, rtol=1e-6, atol=0)
    assert differ.sum() <= 2, "entries of equal cost aside"


def test_fisher_information_is_a_mean_of_squares_also_of_what_takes_no_part():
    model = torch.nn.Linear(1, 1)
    unused = torch.nn.Parameter(torch.ones(2))

    class Answers(torch.nn.Module):
        def forward(self):
            return model.weight

    batches = [2.0, 3.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "nsru_train.repair.answer_nll", lambda m, x: (x * model.weight.flatten(), None)
        )
        found = diagonal_fisher(model, [model.weight, unused], batches)
    assert found.tolist() == [6.5, 0.0, 0.0]


def test_an_adapter_is_trained_further_only_where_it_was_made(run, tmp_path):
    def swapped(**changes):
        model, _ = load_model(ModelConfig(str(run.parent / "model")))
        nk.swap_linears(model, "all-linear", **{"rank": 8, "alpha": 16.0, **changes})
        return model

    plain = tmp_path / "plain"
    nk.save_lora_adapter(swapped(), plain)
    copy_lora_adapter(swapped(), plain)
    for model, message in (
        (swapped(rank=4), "has rank 8 and alpha 16, the model's 4 and 16"),
        (swapped(alpha=8.0), "has rank 8 and alpha 16, the model's 8 and 8"),
        (swapped(exclude=["q_proj"]), r"differ in .*q_proj; same targets\?"),
    ):
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match=message):
            copy_lora_adapter(model, plain)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("command", ["refresh", "rollback"])
def test_mistakes_are_one_line(run, tmp_path, command, capsys):
    def refuse(*arguments):
        with pytest.raises(SystemExit):
            main([command, *arguments, f"--out={tmp_path / 'out'}"])
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "no folder" in refuse("nowhere")
    (tmp_path / "empty").mkdir()
    assert "does not say model" in refuse(str(tmp_path / "empty"))
    odd = {"refresh": ("--steps=0", "steps must be ≥ 1"), "rollback": ("--rho=2", "rho must be")}
    assert odd[command][1] in refuse(str(run), odd[command][0])


def test_a_damaged_adapter_is_refused_before_training(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("refresh", "rollback"))
    path = copy / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[min(tensors)][0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(SystemExit):
        main(["refresh", str(copy), "--steps=1"])
    assert "NaN" in capsys.readouterr().err


def test_alternatives_that_the_run_wrote_are_taught_again(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("refresh", "rollback"))
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config |= {"method": "lune", "objective": {"guard": 0.1}}
    config["data"]["write_alternatives"] = 1
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    records = load_records(config["data"]["forget"])
    written = [dataclasses.replace(qa, alternatives=("In Rome.",)) for qa in records]
    save_records(copy / "alternatives.jsonl", written)
    found = FinishedRun(str(copy), str(tmp_path / "out")).data.forget
    assert [qa.alternatives for qa in found] == [("In Rome.",)] * len(records)


def test_code_that_a_run_names_is_said_before_it_is_imported(run, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("refresh", "rollback"))
    config = yaml.safe_load((copy / "config.yaml").read_text()) | {"method": "no.such:Method"}
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"cannot import 'no\.such:Method'"):
        FinishedRun(str(copy), str(tmp_path / "out"))
    assert f"the code of no.such:Method is run, for {copy}/config.yaml names it" in caplog.text


def test_a_refresh_reports_to_nothing(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("refresh", "rollback"))
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["train"]["report_to"] = ["no such integration"]
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    main(["refresh", str(copy), "--steps=1"])
    assert rows_of(copy / "refresh")


def test_the_row_of_a_method_that_keeps_the_best_is_of_what_it_keeps(run, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("refresh", "rollback"))
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config |= {"method": "lune", "objective": {"guard": 0.0}}
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    main(["refresh", str(copy), "--steps=4", "--eval_steps=2", "--lr=0.1"])
    rows, results = rows_of(copy / "refresh")
    continued = [p for p in results["frontier"] if p["method"] == "continued"]
    assert rows["continued"]["kept_step"] == 0
    assert rows["continued"]["forget_prob"] == continued[0]["forget_prob"]
    assert "Step 0 is kept" in caplog.text
