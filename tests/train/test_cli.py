"""The commands in the order a user runs them, on a tiny model, and the mistakes a user makes."""

import datetime
import inspect
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from samples import save_tiny

from nsru_kernels.hf.peft_format import CONFIG
from nsru_train.cli import main
from nsru_train.commands import train
from nsru_train.config import DataConfig, ModelConfig, SubspaceConfig
from nsru_train.data import encode
from nsru_train.demo.authors import author_splits
from nsru_train.methods import METHODS
from nsru_train.sources import save_records

# The run that all tests look at is drawn; the others need no drawings.
pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Flags for a tiny random model and small sets of fictitious authors."""
    folder = tmp_path_factory.mktemp("setting")
    splits = author_splits(authors=4, forget=1)
    save_tiny(folder / "model", (*splits.forget, *splits.retain), heads=2, kv_heads=1)
    for name in ("forget", "retain", "holdout"):
        save_records(folder / f"{name}.jsonl", getattr(splits, name)[:6])
    return folder


def flags(setting: Path, **changes: str) -> list[str]:
    given = {
        "model.path": str(setting / "model"),
        "data.forget": str(setting / "forget.jsonl"),
        "data.retain": str(setting / "retain.jsonl"),
        **changes,
    }
    return [f"--{name}={value}" for name, value in given.items()]


TRAIN = (
    "--objective.w_suppress=1",
    "--objective.suppression=npo",  # the model knows nothing yet that unlikelihood could see
    "--train.steps=6",
    "--train.lr=0.02",
    "--train.batch_size=3",
    "--train.save_steps=3",
)


@pytest.fixture(scope="module")
def run(setting, tmp_path_factory):
    """A finished training run."""
    out = tmp_path_factory.mktemp("run") / "nsru"
    more = json.dumps({"holdout": str(setting / "holdout.jsonl")})
    main(["train", *flags(setting), f"--data.more={more}", *TRAIN, f"--out={out}"])
    return out


def next_command(printed: str) -> str:
    return re.findall(r"^next: (.*)$", printed, re.MULTILINE)[-1]


def other_model(setting: Path, folder: Path) -> Path:
    """The setting's model with one weight matrix changed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(setting / "model")
    other.model.layers[0].mlp.up_proj.weight.data.mul_(1.1)
    other.save_pretrained(folder / "other")
    AutoTokenizer.from_pretrained(setting / "model").save_pretrained(folder / "other")
    return folder / "other"


def fails(capsys, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code
    printed = capsys.readouterr()
    return printed.err + printed.out


def test_run_folder_is_complete(run):
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "results.json",
        "adapter",
        "subspaces",
        "report.html",
        "figures",
    ):
        assert (run / name).exists(), name
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["train"]["steps"] == 6
    assert config["lora"] == {
        "rank": 8, "alpha": 16.0, "rank_pattern": {}, "alpha_pattern": {}, "dropout": 0.0,
        "project": True,
    }  # fmt: skip
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6


def test_eval_merge_verify_report(run, capsys):
    main(["eval", str(run), "--max_new_tokens=4"])
    printed = capsys.readouterr().out
    assert "forget" in printed
    assert next_command(printed) == f"nsru verify {run}"
    results = json.loads((run / "eval" / "results.json").read_text())
    assert results["schema"] == 1
    assert set(results["metrics"]) >= {"forget", "retain", "holdout"}

    main(["verify", str(run)])
    assert next_command(capsys.readouterr().out) == f"nsru merge {run}"
    main(["merge", str(run)])
    main(["verify", str(run)])
    assert next_command(capsys.readouterr().out) == f"nsru report {run}"
    main(["report", str(run)])
    assert (run / "report.html").stat().st_size > 1000


def test_an_adapter_that_the_run_did_not_save_is_noticed(run, tmp_path, capsys, caplog):
    """Half of one is a whole adapter to everybody else, and so is one of another scale."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    weights, config = (copy / "adapter" / name for name in ("adapter_model.safetensors", CONFIG))
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "base_model_name_or_path": "elsewhere"}))
    main(["verify", str(copy)])
    capsys.readouterr()

    config.write_text(json.dumps({**settings, "lora_alpha": 2 * settings["lora_alpha"]}))
    assert "FAIL  adapter of the run: " in fails(capsys, ["verify", str(copy)])
    config.write_text(json.dumps(settings))
    tensors = {k: v for k, v in load_file(weights).items() if "layers.0" not in k}
    save_file(tensors, weights)
    assert "FAIL  adapter of the run: " in fails(capsys, ["verify", str(copy)])
    main(["eval", str(copy), "--max_new_tokens=2", f"--out={tmp_path / 'eval'}"])
    assert "is not what the run saved" in caplog.text
    caplog.clear()
    main(["eval", str(copy), f"--adapter={run / 'adapter'}"])
    assert (copy / f"eval-{run.name}" / "results.json").is_file(), "not the run's own evaluation"
    main(["merge", str(copy), f"--adapter={run / 'adapter'}"])
    assert (copy / f"merged-{run.name}" / "model.safetensors").is_file(), "not the run's own model"
    main(["verify", str(copy), f"--adapter={run / 'adapter'}"])
    assert "verify passed" in capsys.readouterr().out
    assert "is not what the run saved" not in caplog.text


def test_train_and_eval_tell_before_and_after(run):
    results = json.loads((run / "results.json").read_text())
    before, after = results["methods"]
    assert (before["method"], after["method"]) == ("before", "nsru")
    assert results["setup"]["questions"] == dict.fromkeys(
        ("forget", "retain", "holdout", "safe"), 6
    )
    names = {f"{name}_prob" for name in results["setup"]["questions"]}
    assert names <= before.keys() & after.keys()
    assert after["forget_prob"] < before["forget_prob"]
    assert len(results["ordinary"]) == 16
    shown = {row["question"]: row["after"] for row in results["examples"]}
    assert shown == {row["question"]: row["after"] for row in results["ordinary"]}
    assert all(isinstance(row["before"], str) for row in results["examples"])
    assert "ordinary questions" in (run / "report.html").read_text()
    assert "Before and after" in (run / "report.html").read_text()

    options = ["--max_new_tokens=4", "--examples=2", f"--out={run / 'again'}"]
    main(["eval", str(run), *options])
    examples = json.loads((run / "again" / "results.json").read_text())["examples"]
    splits = [row["split"] for row in examples]
    assert splits == ["forget", "forget", "retain", "retain", "holdout", "holdout"]
    assert all(isinstance(row[model], str) for row in examples for model in ("before", "after"))
    config = yaml.safe_load((run / "again" / "config.yaml").read_text())
    assert config["adapter"] == f"{run}/adapter"
    assert config["model"]["path"].endswith("/model")
    page = (run / "again" / "report.html").read_text()
    assert "Base model" in page
    assert "Evaluated model" in page
    assert page.count("2 of 6") == 3


def test_a_look_at_the_base_leads_on_to_training(setting, tmp_path, capsys):
    more = json.dumps({"holdout": str(setting / "holdout.jsonl")})
    chosen = [*flags(setting), f"--data.more={more}", "--data.max_length=300"]
    main(["eval", str(tmp_path), "--base=true", *chosen, "--max_new_tokens=2", "--examples=0"])
    command = shlex.split(next_command(capsys.readouterr().out))
    assert command[:2] == ["nsru", "train"]
    assert command[-2:] == ["--out", "runs/nsru"]
    found = json.loads((tmp_path / "eval-base" / "results.json").read_text())
    assert found["examples"] == []
    own = [*chosen, "--max_new_tokens=2", "--examples=0", f"--out={tmp_path}"]
    main(["eval", str(tmp_path), "--base=true", *own])
    assert shlex.split(next_command(capsys.readouterr().out))[1] == "train"  # no adapter here yet

    out = tmp_path / "run"
    quick = ["--train.steps=2", "--train.eval_steps=1", "--train.save_steps=0"]
    main([*command[1:-1], str(out), *quick])
    configs = [
        yaml.safe_load((folder / "config.yaml").read_text())
        for folder in (tmp_path / "eval-base", out)
    ]
    assert all(configs[0][section] == configs[1][section] for section in ("model", "data"))
    printed = capsys.readouterr()
    number = r"\d\.\d{4}"
    shown = ", ".join(f"{name} {number}" for name in ("forget", "retain", "holdout", "safe"))
    looks = re.findall(rf"^step (\d): probability of answers: {shown}$", printed.out, re.MULTILINE)
    assert looks == ["0", "1", "2"]
    assert printed.err.count("scoring:   0%|") == 2, "before and after"


def test_the_steps_are_drawn_that_were_evaluated(setting, tmp_path):
    out = tmp_path / "run"
    main(["train", *flags(setting), *TRAIN, "--train.eval_steps=2", f"--out={out}"])
    results = json.loads((out / "results.json").read_text())
    assert [row["step"] for row in results["frontier"]] == [0, 2, 4, 6]
    assert {row["method"] for row in results["frontier"]} == {"nsru"}
    last, after = results["frontier"][-1], results["methods"][1]
    assert last["forget_prob"] == pytest.approx(after["forget_prob"], rel=1e-5)
    assert "The same over the steps" in (out / "report.html").read_text()


def test_a_model_that_cannot_generate_is_trained_all_the_same(
    setting, tmp_path, capsys, monkeypatch
):
    def fail(*_, **__):
        raise RuntimeError("no cache")

    monkeypatch.setattr("nsru_train.ordinary.greedy_answers", fail)
    main(["train", *flags(setting), *TRAIN, f"--out={tmp_path / 'run'}"])
    assert "ordinary requests were not asked: no cache" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "results.json").read_text())["ordinary"] == []


def test_eval_does_not_write_into_a_training_run(run, capsys):
    assert "training run" in fails(capsys, ["eval", str(run), f"--out={run}"])


def test_subspaces_can_be_estimated_first(setting, tmp_path, capsys):
    main(["subspace", *flags(setting), f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    assert "editability" in printed
    command = next_command(printed).split()
    assert command[:2] == ["nsru", "train"]
    command[command.index("--out") + 1] = str(tmp_path / "run")
    main([*command[1:], "--train.steps=2", "--train.save_steps=0"])
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


def test_resume_after_the_first_checkpoint_gives_the_same_adapter(setting, run, tmp_path, capsys):
    out = tmp_path / "again"
    more = json.dumps({"holdout": str(setting / "holdout.jsonl")})
    command = ["train", *flags(setting), f"--data.more={more}", *TRAIN, f"--out={out}"]
    main(command)
    for late in ("checkpoint-6", "adapter"):
        shutil.rmtree(out / late)
    assert "--resume true" in fails(capsys, command)
    main([*command, "--resume=true"])
    weights = "adapter/adapter_model.safetensors"
    assert (out / weights).read_bytes() == (run / weights).read_bytes()
    once, resumed = (
        [
            {key: value for key, value in row.items() if key.endswith("_prob")}
            for row in json.loads((folder / "results.json").read_text())["methods"]
        ]
        for folder in (run, out)
    )
    assert once == resumed


def test_a_run_keeps_the_date_that_its_prompts_began_with(setting, tmp_path, monkeypatch, caplog):
    from transformers import AutoTokenizer
    from transformers.utils import chat_template_utils

    class Day(datetime.datetime):
        day_of_run = 3

        @classmethod
        def now(cls, tz=None):
            return cls(2026, 5, cls.day_of_run)

    for module in (chat_template_utils, encode):
        monkeypatch.setattr(module, "datetime", Day)
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(setting / "model", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% if not date_string %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today: {{ date_string }}{% for m in messages %} {{ m.role }}: {{ m.content }}{% endfor %}"
        "{{ ' assistant:' if add_generation_prompt else eos_token }}"
    )
    tokenizer.save_pretrained(model)
    command = ["train", *flags(setting), f"--model.path={model}", *TRAIN, f"--out={out}"]
    main(command)
    assert "Here it stays 03 May 2026, by data.chat_template_kwargs" in caplog.text
    Day.day_of_run = 4
    weights = (out / "adapter/adapter_model.safetensors").read_bytes()
    for late in ("checkpoint-6", "adapter"):
        shutil.rmtree(out / late)
    caplog.clear()
    main([*command, "--resume=true"])
    main(["eval", str(out), "--max_new_tokens=2"])
    assert "today's date" not in caplog.text
    assert (out / "adapter/adapter_model.safetensors").read_bytes() == weights
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["data"]["chat_template_kwargs"] == {"date_string": "03 May 2026"}


def test_resume_with_other_settings_is_refused(setting, run, capsys):
    error = fails(
        capsys, ["train", *flags(setting), "--train.lr=0.5", f"--out={run}", "--resume=true"]
    )
    assert "differs" in error


OWN_METHOD = '''
from dataclasses import dataclass

import torch

from nsru_train.losses import FORGET, SAFE
from nsru_train.methods import Method


@dataclass(frozen=True)
class FLAT(Method):
    """tanh of the mean token probability: that of the safe target up, of the other down."""

    sharpness: float = 1.0
    rows = (SAFE, FORGET)
    parts = ("safe", "forget")

    def loss(self, batch):
        safe, forget = (
            torch.tanh(self.sharpness * torch.exp(-batch[kind].nll).mean()) / 2
            for kind in (SAFE, FORGET)
        )
        return {"safe": safe, "forget": forget, "total": forget - safe}
'''


def test_a_method_from_outside_the_package(setting, tmp_path, monkeypatch, capsys):
    (tmp_path / "flat_method.py").write_text(OWN_METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "flat"
    chosen = ["train", *flags(setting), "--method=flat_method:FLAT", f"--out={out}"]
    quick = ["--train.steps=4", "--train.batch_size=3", "--train.lr=0.02", "--train.save_steps=4"]
    main([*chosen, *quick, "--objective.sharpness=2"])
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["method"] == "flat_method:FLAT"
    assert config["objective"] == {"sharpness": 2.0}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(x["total"] == pytest.approx(x["forget"] - x["safe"], abs=1e-6) for x in lines[:4])
    results = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in results["methods"]] == ["before", "FLAT projected"]
    assert "FLAT projected" in (out / "report.html").read_text()
    other = ["train", *flags(setting), "--method=npo", *quick, f"--out={out}", "--resume=true"]
    assert "method was flat_method:FLAT and is npo" in fails(capsys, other)
    error = fails(capsys, [*chosen, *quick, "--objective.sharpnesss=2"])
    assert "Did you mean --objective.sharpness?" in error


@pytest.mark.parametrize("order", ["flag last", "file last"])
def test_the_last_method_counts_for_its_loss_and_its_record(setting, tmp_path, capsys, order):
    (tmp_path / "c.yaml").write_text("method: npo\n")
    given = ["--method=undial", f"--config={tmp_path / 'c.yaml'}"]
    given = given[::-1] if order == "flag last" else given
    with pytest.raises(SystemExit):
        main(["train", *given, *flags(setting), "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    wanted = "undial" if order == "flag last" else "npo"
    assert config["method"] == wanted
    assert config["objective"]["beta"] == METHODS[wanted]().beta


def test_the_help_names_every_method():
    named = inspect.getdoc(train).partition("method:")[2].partition("objective:")[0]
    assert set(re.findall(r"[a-z_]+(?=,| or\b)", named)) >= METHODS.keys()


def test_print_config_shows_every_field(setting, capsys):
    with pytest.raises(SystemExit):
        main(["train", *flags(setting), "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["objective"]["suppression"] == "unlikelihood"
    assert config["subspace"]["targets"] == ["all-linear"]


def test_overlapping_sets(setting, tmp_path, capsys):
    out = tmp_path / "never"
    arguments = flags(setting, **{"data.retain": str(setting / "forget.jsonl")})
    assert "share 6 of 6" in fails(capsys, ["train", *arguments, f"--out={out}"])
    assert not out.exists()


def test_unknown_field(setting, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "q", "answer": "a", "anser": "b"}\n')
    error = fails(capsys, ["train", *flags(setting, **{"data.forget": str(bad)})])
    assert "anser" in error
    assert "bad.jsonl:1" in error


def test_dashes_in_flags(setting, capsys):
    with pytest.raises(SystemExit):
        main(
            ["train", *flags(setting), "--lora.rank", "4", "--data.max-length=99", "--print-config"]
        )
    assert yaml.safe_load(capsys.readouterr().out)["data"]["max_length"] == 99


def test_subspaces_of_another_model(setting, run, tmp_path, capsys):
    arguments = flags(setting, **{"model.path": str(other_model(setting, tmp_path))})
    chosen = f"--subspace.path={run / 'subspaces'}"
    assert "fingerprint" in fails(capsys, ["train", *arguments, chosen, f"--out={tmp_path / 'x'}"])


def test_truncated_adapter(run, tmp_path, capsys):
    broken = shutil.copytree(run / "adapter", tmp_path / "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for command in ("eval", "merge", "verify"):
        assert "truncated" in fails(capsys, [command, str(run), f"--adapter={broken}"]), command


def test_an_evaluation_in_the_form_of_openunlearning(run, tmp_path, capsys):
    for name in ("first", "second"):
        options = ["--format=open-unlearning", "--max_new_tokens=4", f"--out={tmp_path / name}"]
        if name == "second":
            options.append(f"--retain_log={tmp_path / 'first' / 'TOFU_EVAL.json'}")
        main(["eval", str(run), *options])
    found = json.loads((tmp_path / "second" / "TOFU_SUMMARY.json").read_text())
    assert found["privleak"] == pytest.approx(0, abs=1e-6)
    results = json.loads((tmp_path / "second" / "results.json").read_text())
    own = results["metrics"]["forget"]
    for name in ("privleak", "forget_quality"):  # one command says one number
        assert results["metrics"].get(name) == pytest.approx(found.get(name), abs=1e-6), name
        assert not any(note.startswith((f"{name}: against", f"{name}: needs the log"))
                       for note in results["notes"])  # fmt: skip
    assert found["forget_Q_A_Prob"] == pytest.approx(own["probability"])
    assert found["forget_Q_A_ROUGE"] == pytest.approx(own["rougeL_recall"])
    if "truth_ratio" in own:
        assert found["forget_quality"] == 1
    attacks = ("loss", "zlib", "min_k", "min_k_plus_plus", "gradnorm", "reference")
    assert {f"mia_{name}" for name in attacks} <= found.keys()
    assert found["mia_reference"] == 0.5  # of itself: all scores are 0

    log = json.loads((tmp_path / "first" / "TOFU_EVAL.json").read_text())
    log["forget_Q_A_ROUGE"]["value_by_index"].pop("5")
    (tmp_path / "TOFU_EVAL.json").write_text(json.dumps(log))
    options = ["--format=open-unlearning", f"--retain_log={tmp_path}", f"--out={tmp_path / 'no'}"]
    assert "of another forget set: 5 questions" in fails(capsys, ["eval", str(run), *options])
    assert not (tmp_path / "no").exists()


def test_privleak_is_against_the_retain_log(run, tmp_path):
    def evaluated(name, *options):
        main(["eval", str(run), "--generate=false", f"--out={tmp_path / name}", *options])
        return json.loads((tmp_path / name / "results.json").read_text())

    first = evaluated("first")
    assert any(note.startswith("privleak: against an AUC of 0.5") for note in first["notes"])
    second = evaluated("second", f"--retain_log={tmp_path / 'first' / 'results.json'}")
    assert second["metrics"]["privleak"] == pytest.approx(0)
    assert not any(note.startswith(("privleak", "retain_log")) for note in second["notes"])
    log = tmp_path / "first" / "results.json"
    setup = {"compared": "x", "prompt": "Sing: {}"}
    of_a_member = {**first["metrics"], "membership_auc": 1.0}
    log.write_text(json.dumps({**first, "metrics": of_a_member, "setup": setup}))
    third = evaluated("third", f"--retain_log={log}")
    assert "privleak" not in third["metrics"]
    for told in (
        "retain_log: it was made with other paraphrases or wrong answers",
        "retain_log: its model was asked by 'Sing: {}'",
        "privleak: left out, by the log's membership_auc of 1",
    ):
        assert sum(note.startswith(told) for note in third["notes"]) == 1, told
    log.write_text(json.dumps(first["log"]))  # TOFU's own: no questions, no setup
    fourth = evaluated("fourth", f"--retain_log={log}")
    assert sum(note.startswith("retain_log: it does not say") for note in fourth["notes"]) == 1


def test_a_retain_log_of_other_questions_is_named_before_any_is_asked(
    setting, run, tmp_path, capsys, monkeypatch
):
    main(["eval", str(run), "--generate=false", f"--out={tmp_path / 'first'}"])
    path = tmp_path / "first" / "results.json"
    results = json.loads(path.read_text())
    monkeypatch.setattr(
        "nsru_train.evaluation.score_share", lambda *_, **__: pytest.fail("too late")
    )

    def refused(change):
        changed = json.loads(json.dumps(results))
        change(changed)
        path.write_text(json.dumps(changed))
        options = [f"--retain_log={path}", f"--out={tmp_path / 'no'}"]
        error = fails(capsys, ["eval", str(run), *options])
        assert not (tmp_path / "no").exists()
        return error

    def rename(split):
        def change(found):
            next(row for row in found["examples"] if row["split"] == split)["question"] = "Who?"

        return change

    assert "of another forget set: 6 questions, the first one 'Who?'" in refused(rename("forget"))
    assert "of another holdout set: 6 questions" in refused(rename("holdout"))
    few = refused(lambda found: found["metrics"]["holdout"].update(count=5))
    assert "of another holdout set: 5 questions" in few
    path.unlink()
    error = fails(capsys, ["eval", str(run), f"--retain_log={path}"])
    assert f"log {path}: cannot be read" in error


def test_adapter_of_another_base(setting, run, tmp_path, capsys):
    other = other_model(setting, tmp_path)
    for command in ("eval", "merge", "verify"):
        error = fails(capsys, [command, str(run), f"--model.path={other}"])
        assert "fingerprint" in error, command


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--model.path=SETTING/none", "model.path"),
        ("--subspace.targets=[q_prj]", "'q_proj'"),
        ('--subspace={"rank": 4, "energy": 0.9}', "one of rank"),
        ("--train.steps=0", "train.steps"),
        ("--train.lr=nan", "train.lr"),
        ("--train.warmup=3", "train.warmup"),
        ("--train.retain_stop_ratio=0.5", "train.retain_stop_ratio"),
        ("--model.device=cuda:99", "model.device"),
        ("--subspace.rank=32", "full rank"),
        ('--data.more={"holdot": "x.jsonl"}', "holdout"),
    ],
)
def test_unusable_settings(setting, tmp_path, capsys, flag, named):
    chosen = ["--subspace.targets=[q_proj]", flag.replace("SETTING", str(setting))]
    error = fails(capsys, ["train", *flags(setting), *chosen, f"--out={tmp_path / 'x'}"])
    assert named in error


def test_finished_runs_are_kept(setting, tmp_path, capsys):
    short = ["--train.steps=2", "--train.save_steps=0", f"--out={tmp_path}"]
    main(["train", *flags(setting), *short])
    adapter = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert "finished run" in fails(capsys, ["train", *flags(setting), *short])
    assert "training run" in fails(capsys, ["subspace", *flags(setting), f"--out={tmp_path}"])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_report_of_nothing(tmp_path, capsys):
    assert "no folder" in fails(capsys, ["report", str(tmp_path / "none")])


@pytest.mark.parametrize("backend", ["auto", "foo"])
def test_env_names_every_op(capsys, monkeypatch, backend):
    monkeypatch.setenv("NSRU_BACKEND", backend)
    main(["env"])
    printed = capsys.readouterr().out
    for word in ("torch", "nsru_linear", "eager", "triton", "cuda"):
        assert word in printed
    assert ("got 'foo'" in printed) == (backend == "foo")


def test_bench_has_the_options_of_the_script(tmp_path, capsys):
    main(["bench", "fold", "--tiny", "--dtype=float32", "--rounds=1", f"--out={tmp_path}"])
    assert (tmp_path / "fold.csv").is_file()
    assert "eager, a loop" in capsys.readouterr().out
    assert "choose from" in fails(capsys, ["bench", "fould"])


def test_paths_of_a_run_hold_in_every_working_directory(setting, monkeypatch):
    monkeypatch.chdir(setting)
    data = DataConfig("forget.jsonl", "tofu:retain99", more={"holdout": "holdout.jsonl"})
    assert data.forget == str(setting / "forget.jsonl")
    assert data.retain == "tofu:retain99"
    assert data.more == {"holdout": str(setting / "holdout.jsonl")}
    assert (data.data_dir, SubspaceConfig().path) == (None, None)
    assert ModelConfig("model").path == str(setting / "model")
    assert ModelConfig("org/on-the-hub").path == "org/on-the-hub"
