"""OpenUnlearning's configuration as settings of `nsru train`."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from samples import save_tiny
from stand_in_checkout import write_stand_in

from nsru_train.demo.authors import author_splits
from nsru_train.open_unlearning import mapping
from nsru_train.open_unlearning.mapping import expand, flags, settings_of

REAL = os.environ.get("OPEN_UNLEARNING")
TAGS = {"user_start_tag": "Question: ", "user_end_tag": "\n", "asst_start_tag": "Answer: ",
        "asst_end_tag": "\n\n"}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    splits = author_splits(authors=8, forget=1, holdout=2)
    for name, found in (("forget01", splits.forget[:8]), ("retain99", splits.retain[:20]),
                        ("holdout01", splits.holdout[:4])):  # fmt: skip
        lines = (json.dumps({"question": qa.question, "answer": qa.answer}) for qa in found)
        (tmp_path / f"{name}.json").write_text("\n".join(lines))
    save_tiny(tmp_path / "model", [*splits.forget, *splits.retain])
    return tmp_path


def dataset(name, **arguments):
    source = {"path": "locuslab/TOFU", "name": name, "split": "train"}
    args = {"hf_args": source, "question_key": "question", "answer_key": "answer",
            "max_length": 400, **arguments}  # fmt: skip
    return {"some": {"handler": "QADataset", "args": args}}


@pytest.fixture
def config():
    return {
        "model": {
            "model_args": {"pretrained_model_name_or_path": "here/model",
                           "attn_implementation": "flash_attention_2"},
            "tokenizer_args": {"pretrained_model_name_or_path": "here/tokenizer"},
            "template_args": {"apply_chat_template": True, "system_prompt": "Be kind.",
                              "date_string": "10 Apr 2025", **TAGS},
        },
        "data": {"anchor": "forget", "forget": dataset("forget01"), "retain": dataset("retain99"),
                 "eval": None},
        "trainer": {
            "handler": "SimNPO",
            "args": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2,
                     "learning_rate": 2e-4, "num_train_epochs": 3, "warmup_epochs": 1.0,
                     "optim": "paged_adamw_32bit", "save_strategy": "no", "bf16": True,
                     "logging_dir": "logs", "report_to": "none", "seed": 5},
            "method_args": {"gamma": 0.125, "alpha": 1.0, "beta": 4.5, "delta": 0.0,
                            "retain_loss_type": "NLL"},
        },
        "mode": "unlearn", "eval": None, "holdout_split": "holdout01",
    }  # fmt: skip


def test_every_section(config, folder, monkeypatch):
    monkeypatch.setattr(mapping, "default_device", lambda: torch.device("cpu"))
    assert settings_of(config, str(folder)) == {
        "model": {"path": "here/model", "tokenizer": "here/tokenizer", "dtype": "float32"},
        "data": {
            "forget": "tofu:forget01", "retain": "tofu:retain99",
            "question_column": "question", "answer_column": "answer", "max_length": 400,
            "more": {"holdout": "tofu:holdout01"}, "system_prompt": "Be kind.",
            "chat_template_kwargs": {"date_string": "10 Apr 2025"},
        },
        "method": "simnpo",
        "objective": {"w_forget": 0.125, "w_retain": 1.0, "beta": 4.5, "delta": 0.0,
                      "retain": "nll"},
        # Three times 8 questions in batches of 3, 3 and 2, two of them a step.
        "train": {"batch_size": 3, "accumulate": 2, "steps": 5, "warmup": pytest.approx(0.3),
                  "lr": 2e-4, "bf16": False, "save_steps": 0, "report_to": [], "seed": 5},
    }  # fmt: skip


def change(config, path, value):
    *parents, name = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[name] = value


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("other", 1, "other: has no counterpart"),
        ("mode", "train", "mode: must be unlearn, got train"),
        ("model.model_args.rope_scaling", 2, "model.model_args.rope_scaling: has no counterpart"),
        ("model.model_handler", "ProbedLlamaForCausalLM", "model.model_handler: ProbedLlama"),
        ("model.template_args.suffix", "x", "model.template_args.suffix: has no counterpart"),
        ("data.anchor", "retain", "data.anchor: must be forget, got retain"),
        ("data.forget.some.handler", "PretrainingDataset", "data.forget.some.handler: Pretraining"),
        ("data.forget.some.args.hf_args.path", "my/hub", "hf_args.path: my/hub is neither"),
        ("data.forget.some.args.max_length", 9, "max_length: is another in the other set"),
        ("data.retain.some.args.few_shot_dataset_hf_args", {"path": "x"},
         "few_shot_dataset_hf_args: has no counterpart"),
        ("trainer.handler", "Mine", "trainer.handler: Mine is none of GradAscent"),
        ("trainer.method_args.theta", 1, "trainer.method_args.theta: simnpo has no such setting"),
        ("trainer.args.optim", "adafactor", "trainer.args.optim: must be paged_adamw_32bit or"),
        ("trainer.args.max_grad_norm", 3, "trainer.args.max_grad_norm: has no counterpart"),
        ("trainer.args.save_strategy", "epoch", "trainer.args.save_strategy: must be no, or steps"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_named(config, folder, path, value, said):
    change(config, path, value)
    with pytest.raises(ValueError, match="settings cannot be mapped") as error:
        settings_of(config, str(folder))
    assert said in str(error.value)


def test_all_are_named_at_once(config, folder):
    change(config, "one", 1)
    change(config, "trainer.method_args.two", 2)
    with pytest.raises(ValueError, match=r"2 settings .* one: .*method_args.two"):
        settings_of(config, str(folder))


def test_texts_without_a_chat_template(config, folder):
    change(config, "model.template_args", {"apply_chat_template": False, **TAGS})
    assert "system_prompt" not in settings_of(copy.deepcopy(config), str(folder))["data"]
    change(config, "model.template_args.user_start_tag", "Q: ")
    with pytest.raises(ValueError, match=r"'user_start_tag': 'Q: '.* where a text without"):
        settings_of(config, str(folder))


@pytest.mark.parametrize(
    ("handler", "given", "expected"),
    [
        ("GradAscent", {}, ("ga", {})),
        ("NPO", {"beta": 0.1, "retain_loss_type": "KL"},
         ("npo", {"beta": 0.1, "retain": "kl", "compat": "open-unlearning"})),
        ("CEU", {"ignore_first_n_answer_tokens": 2}, ("ceu", {"skip": 2})),
        ("SatImp", {"beta1": 5.0, "beta2": 1.0, "alpha": 1.0, "gamma": 0.1},
         ("satimp", {"beta1": 5.0, "beta2": 1.0, "w_retain": 1.0, "w_forget": 0.1})),
        ("UNDIAL", {"beta": 10.0}, ("undial", {"beta": 10.0, "compat": "open-unlearning"})),
        ("PDU", {"retain_loss_eps": 0.3, "primal_dual": True, "dual_step_size": 5,
                 "dual_update_upon": "step", "dual_warmup_epochs": 5, "gamma": 1.0, "alpha": 100,
                 "loss_names": ["a", "b"], "retain_loss_type": "NLL"},
         ("pdu", {"bound": 0.3, "dual_lr": 5, "dual_warmup": 5, "w_forget": 1.0,
                  "multiplier": 100, "compat": "open-unlearning"})),
        ("RMU", {"gamma": 1.0, "alpha": 1, "steering_coeff": 2, "retain_loss_type": "EMBED_DIFF",
                 "module_regex": r"model\.layers\.7",
                 "trainable_params_regex": [r"model\.layers\.(5|6|7)\.mlp\.down_proj\.weight"]},
         ("rmu", {"w_forget": 1.0, "w_retain": 1, "steering": 2, "layer": 7,
                  "compat": "open-unlearning"})),
    ],
)  # fmt: skip
def test_methods(config, folder, handler, given, expected):
    config["trainer"].update(handler=handler, method_args=given)
    mapped = settings_of(config, str(folder))
    assert (mapped["method"], mapped["objective"]) == expected


def test_all_weights_of_rmu_have_no_counterpart(config, folder):
    given = {"module_regex": r"model\.layers\.7", "trainable_params_regex": [".*"]}
    config["trainer"].update(handler="RMU", method_args=given)
    with pytest.raises(ValueError, match=r"mlp.down_proj of layers 5 to 7 alone"):
        settings_of(config, str(folder))


def test_flags_are_read_back():
    given = {"model": {"path": "a b"}, "method": "npo", "data": {"more": {"holdout": "x"}}}
    assert flags(given) == ["--model.path=a b", "--method=npo", '--data.more={"holdout": "x"}']


@pytest.mark.parametrize(
    "repo",
    [
        "stand-in",
        pytest.param(
            "real",
            marks=pytest.mark.skipif(REAL is None, reason="OPEN_UNLEARNING names no checkout"),
        ),
    ],
)
def test_the_command_line(repo, folder, capsys):
    """From their configuration to an adapter; a flag of ours counts more."""
    pytest.importorskip("hydra", reason="hydra-core is not installed")
    from nsru_train.cli import main

    checkout = Path(REAL) if repo == "real" else write_stand_in(folder / "checkout")
    words = [
        "train", "--open-unlearning", str(checkout), "experiment=unlearn/tofu/default",
        "trainer=NPO", "forget_split=forget01", "retain_split=retain99", "model=phi-1_5",
        "holdout_split=holdout01", "trainer.args.report_to=none",
        *(f"model.{part}.pretrained_model_name_or_path={folder / 'model'}"
          for part in ("model_args", "tokenizer_args")),
        "trainer.args.num_train_epochs=2", "--data.data-dir", str(folder), "--train.lr=5e-3",
        "--lora.rank", "2", "--subspace.width=24", "--out", str(folder / "run"),
    ]  # fmt: skip
    assert not any("experiment" in word for word in expand(words))
    main(words)
    assert "train.lr" not in capsys.readouterr().out
    words = [word for word in words if not word.startswith("--train.lr")]
    other = expand([*words, "--method", "nsru"])
    assert "train.lr: 1e-05 is a rate of full fine-tuning" in capsys.readouterr().out
    assert other[-1] == "nsru"
    assert not any(word.startswith(("--objective", "--method=")) for word in other)
    saved = (folder / "run" / "config.yaml").read_text()
    assert "method: npo" in saved
    assert "lr: 0.005" in saved
    assert "warmup: 0.25" in saved
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_bad_input_of_the_command_line(tmp_path, folder):
    assert expand(["train", "--out", "x"]) == ["train", "--out", "x"]
    with pytest.raises(ValueError, match=r"has no configs/unlearn.yaml; give a checkout"):
        expand(["train", f"--open-unlearning={tmp_path}", "trainer=NPO"])
    with pytest.raises(ValueError, match="belongs to nsru train"):
        expand(["eval", "--open-unlearning", str(tmp_path)])
    pytest.importorskip("hydra", reason="hydra-core is not installed")
    checkout = write_stand_in(folder / "checkout")
    with pytest.raises(ValueError, match="Could not override 'nonsense'"):
        expand(["train", "--open-unlearning", str(checkout), "nonsense=1"])
