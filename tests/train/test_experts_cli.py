"""Adapters on fused experts by the commands."""

import json

import pytest
import yaml
from kernels.expert_cases import tiny_moe
from samples import save_tiny
from transformers import AutoTokenizer

import nsru_kernels as nk
from nsru_train.cli import main
from nsru_train.config import ModelConfig
from nsru_train.demo.authors import author_splits
from nsru_train.loading import load_model
from nsru_train.methods.fila import start_with_fila
from nsru_train.sources import save_records

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    splits = author_splits(authors=4, forget=1)
    save_tiny(folder / "model", (*splits.forget, *splits.retain))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tiny_moe("mixtral", vocab_size=len(tokenizer), initializer_range=0.1).save_pretrained(
        folder / "model"
    )
    for name in ("forget", "retain"):
        save_records(folder / f"{name}.jsonl", getattr(splits, name)[:6])
    return [
        f"--model.path={folder / 'model'}",
        f"--data.forget={folder / 'forget.jsonl'}",
        f"--data.retain={folder / 'retain.jsonl'}",
        '--subspace.targets=["q_proj", "experts"]',
        "--subspace.rank=4",
        "--train.steps=8",
        "--train.lr=0.02",
        "--train.batch_size=3",
    ]


def test_train_eval_verify_merge(arguments, tmp_path, capsys):
    run = tmp_path / "run"
    objective = ["--objective.w_suppress=1", "--objective.suppression=npo"]
    main(["train", *arguments, *objective, f"--out={run}"])
    assert "gate_up_proj × 2" in capsys.readouterr().out
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert len(config["target_parameters"]) == 4
    assert yaml.safe_load((run / "config.yaml").read_text())["subspace"]["targets"][1] == "experts"
    main(["eval", str(run), "--max_new_tokens=4"])
    main(["verify", str(run)])
    main(["merge", str(run)])
    main(["verify", str(run)])
    assert "merged model" in capsys.readouterr().out


def test_attacks_relearn_the_experts_and_say_that_none_is_quantised(arguments, tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run = tmp_path / "run"
    main(["train", *arguments, f"--out={run}"])
    steps = ["--steps=2", "--max_new_tokens=2"]
    main(["attack", str(run), '--attacks=["relearn", "quantise"]', *steps])
    results = json.loads((run / "attack" / "results.json").read_text())
    names = {row["attack"] for row in results["attacks"]}
    assert {"relearned", "relearned in its own LoRA", "int8"} <= names
    [note] = [note for note in results["notes"] if "experts" in note]
    base, _ = load_model(arguments[0].partition("=")[2])
    held = sum(p.numel() for n, p in base.named_parameters() if ".experts." in n)
    share = held / base.num_parameters()
    assert f"experts, {share:.0%} of all parameters, stay as is" in note


def test_a_quantised_base_says_that_its_experts_are_not(arguments, tmp_path, caplog):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    path = arguments[0].partition("=")[2]
    load_model(ModelConfig(path, quantize="nf4"))
    assert "model.quantize: linear layers only are quantised: experts, " in caplog.text


def test_methods_of_linear_layers_only_refuse_experts(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", *arguments, "--method=alter", f"--out={tmp_path / 'run'}"])
    printed = capsys.readouterr()
    assert "is of fused experts; leave them out of subspace.targets" in printed.err + printed.out
    model = tiny_moe("mixtral")
    nk.swap_linears(model, "experts", rank=2, alpha=4)
    with pytest.raises(ValueError, match=r"fila needs plain linear layers, and .* is of fused"):
        start_with_fila(model, [], [])


@pytest.mark.parametrize(
    "command", [["train", "--method=rmu"], ["compare", "--methods=[nsru, rmu]"]]
)
def test_a_method_without_layers_of_its_own_is_refused_before_the_subspaces(
    arguments, command, tmp_path, capsys
):
    with pytest.raises(SystemExit):
        main([*command, *arguments, f"--out={tmp_path / 'run'}"])
    printed = capsys.readouterr()
    assert "RMU: no layer of model.layers has a linear called" in printed.err
    assert "Take another method, such as nsru or npo." in printed.err
    assert "editability" not in printed.out
