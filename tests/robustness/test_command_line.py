"""The command line's answers to a user's slips and damaged files: one line that says the remedy."""

import json
import locale
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from functools import wraps

import docstring_parser
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPConfig, WhisperConfig

import nsru_kernels as nk
from nsru_train import cli, config, estimating, run_config
from nsru_train.demo.tiny_model import make_llama, train_tokenizer
from nsru_train.loading import load_data, load_model
from nsru_train.methods.method import say_once
from nsru_train.run_folder import RunFolder
from nsru_train.trainer import CheckpointError, NSRUTrainer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["Who is Ann? A poet."] * 3, 300)
    small = make_llama(tokenizer, hidden_size=16, layers=1, heads=2, intermediate_size=16)
    for part in (small, tokenizer):
        part.save_pretrained(folder)
    return folder


def fails(capsys, *arguments):
    """The error, which is one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    _, found, error = capsys.readouterr().err.partition("nsru: ")  # after the progress of loading
    assert found
    assert len(error.splitlines()) == 1, error
    return error


SETS = ("--data.forget=authors:forget", "--data.retain=authors:retain")
TRAIN = ("train", "--model.path=none", *SETS)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([*TRAIN, "--train.stepz=3"], "no option 'train.stepz'. Did you mean --train.steps?"),
        ([*TRAIN, "--train.learning_rate=3"], "'train.learning_rate'. Did you mean --train.lr?"),
        ([*TRAIN, "--learning-rate", "3"], "Did you mean --train.lr?"),
        ([*TRAIN, "--lora.lora_alpha=3"], "Did you mean --lora.alpha?"),
        ([*TRAIN, "--steps=3"], "Did you mean --train.steps?"),
        ([*TRAIN, "--train.step=3"], "Did you mean --train.steps?"),
        ([*TRAIN, "--xyzzy=3"], "train has no option 'xyzzy'. `nsru train --help`"),
        ([*TRAIN, "--train.steps=many"], "--train.steps: expected a whole number, got many. `nsru"),
        (["train", *SETS], "required: --model.path"),
        (["merge"], "required"),
        (["trian"], "invalid choice: 'trian'"),
        (["report", "x", "y"], "report has no option 'y'"),
        (["demo", "--modell=x"], "Did you mean --model?"),
        (["train", "--config=none.yaml"], "none.yaml"),
    ],
)
def test_slips_in_flags(capsys, arguments, wanted):
    assert wanted in fails(capsys, *arguments)


EVAL = ["eval", "runs/none"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([*TRAIN, "--train.steps=2.0"], "--train.steps: expected a whole number, got 2.0"),
        ([*TRAIN, "--train.lr=x"], "--train.lr: expected a number, got x"),
        ([*TRAIN, "--resume=2"], "--resume: expected true or false, got 2"),
        ([*TRAIN, "--subspace.rank=x"], "--subspace.rank: expected a whole number or null, got x"),
        ([*TRAIN, "--model.dtype=int8"], "one of auto, float32, bfloat16, float16, got int8"),
        (
            [*TRAIN, "--lora.rank_pattern={q: x}"],
            "--lora.rank_pattern: expected a mapping of names to whole numbers, got x",
        ),
        ([*TRAIN, "--method=npo", "--objective.beta=x"], "--objective.beta: expected a number, "),
        ([*TRAIN, "--subspace=3"], "--subspace: expected its settings, as a mapping or a YAML fi"),
        (["compare", *SETS, "--lrs=[a]"], "--lrs: expected a list of numbers, got a"),
        (["demo", "--lrs={nsru: 3}"], "--lrs: expected a mapping of names to lists of numbers, g"),
        ([*EVAL, "--model.dtype=x"], "--model.dtype: expected one of auto, float32, bfloat16, fl"),
        ([*EVAL, "--data.max_length=2.5"], "--data.max_length: expected a whole number, got 2.5"),
        ([*EVAL, "--data.maxx=x"], "eval has no option 'data.maxx'"),
        ([*EVAL, "--data.skip=true"], "required: --data.forget, --data.retain"),
        ({"subspace": {"targets": [1]}}, "--subspace.targets: expected a list of texts or a text"),
        ({"train": {"steps": 2.0}}, "--train.steps: expected a whole number, got 2.0"),
        ({"train": 3}, "train: expected its settings, as a mapping or a YAML file, got 3."),
    ],
)
def test_a_value_of_another_type_is_told_in_words(capsys, tmp_path, arguments, wanted):
    if isinstance(arguments, dict):
        data = {"forget": "authors:forget", "retain": "authors:retain"}
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump({"model": {"path": "none"}, "data": data} | arguments))
        arguments = ["train", f"--config={file}"]
    error = fails(capsys, *arguments)
    assert wanted in error
    for inner in ("<class", "Union", "Parser key", "NestedArg", "Literal"):
        assert inner not in error


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("train: {stepz: 3}", "no option 'train.stepz'. Did you mean --train.steps?"),
        ("modl: {path: x}", "Did you mean --model.path?"),
        ("train: {steps: 3, lr: 0.1, steps: 5}", "'steps' stands twice"),
        ("train: [1", "not valid YAML"),
        ("train: {steps: x}", "train.steps"),
    ],
)
def test_slips_in_yaml(capsys, tmp_path, text, wanted):
    (tmp_path / "c.yaml").write_text(text)
    assert wanted in fails(capsys, *TRAIN, "--config", tmp_path / "c.yaml")


@pytest.mark.parametrize("place", ["flag", "yaml"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data.max_length", "0"),
        ("lora.dropout", "nan"),
        ("lora.rank", "-2"),
        ("objective.w_kl", ".inf"),
        ("subspace.energy", "95"),
        ("train.lr", "-0.1"),
    ],
)
def test_a_number_out_of_range_is_refused_first(capsys, tmp_path, place, name, value):
    out, given = tmp_path / "run", [f"--{name}={value}"]
    if place == "yaml":
        section, _, field = name.partition(".")
        (tmp_path / "c.yaml").write_text(f"{section}: {{{field}: {value}}}")
        given = ["--config", tmp_path / "c.yaml"]
    error = fails(capsys, *TRAIN, *given, f"--out={out}")
    assert name in error
    assert value.lstrip(".") in error
    assert re.search("must (not )?be .*; give a|expected a", error)
    assert not out.exists()


OUT_OF_RANGE = {
    "data.max_length": [0, -5],
    "data.write_alternatives": [-1, 2.5],
    "data.own_requests": [-1, 2.5],
    "lora.rank": [0, -2, 2.5],
    "lora.alpha": [0, -1],
    "lora.rank_pattern": [{"q_proj": 0}, {"q_proj": 2.5}],
    "lora.alpha_pattern": [{"q_proj": 0}],
    "lora.dropout": [1.0, -0.1],
    "objective.w_safe": [-1],
    "objective.w_suppress": [-1],
    "objective.w_retain": [-1],
    "objective.w_kl": [-1],
    "objective.beta": [0, -1],
    "objective.delta": [],
    "subspace.width": [0, -3],
    "subspace.rank": [-1, 2.5],
    "subspace.energy": [95, 0, -0.5],
    "subspace.min_editability": [1.5, 0, -0.1],
    "subspace.own_texts": [-1],
    "subspace.max_tokens": [0],
    "train.steps": [0, -1, 2.5],
    "train.lr": [-0.001],
    "train.warmup": [-0.1, 1.5, 10],
    "train.batch_size": [0, -2],
    "train.retain_per_forget": [0],
    "train.accumulate": [0, -1],
    "train.weight_decay": [-0.1],
    "train.save_steps": [-1],
    "train.retain_stop_ratio": [1],
    "train.eval_steps": [-1],
    "train.seed": [-1, 2**32],
}


def test_every_number_of_a_section_has_a_range():
    assert OUT_OF_RANGE.keys() == {
        f"{section}.{field.name}"
        for section, kind in run_config.SECTIONS.items()
        for field in fields(kind)
        if re.search(r"\b(int|float)\b", field.type)
    }


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_number_out_of_range_is_no_setting(name):
    section, _, field = name.partition(".")
    given = {"data": {"forget": "f", "retain": "r"}}.get(section, {})
    odd = [math.nan, -math.inf, 10**400, True, "4", [4]]
    pattern = name.endswith("pattern")
    for value in OUT_OF_RANGE[name] + [{"q": value} if pattern else value for value in odd]:
        with pytest.raises(ValueError, match=rf"^{name}\b.* must (not )?be .*; give a"):
            run_config.SECTIONS[section](**given, **{field: value})


@pytest.mark.parametrize("section", run_config.SECTIONS)
def test_an_empty_value_is_refused_where_there_is_no_none(section):
    kind, given = run_config.SECTIONS[section], {"model": {"path": "m"}}.get(section, {})
    given = {"forget": "f", "retain": "r"} if section == "data" else given
    for field in fields(kind):
        options = {**given, field.name: None}
        if re.search("None|Any$", field.type):
            kind(**options)
        else:
            with pytest.raises(ValueError, match=rf"{section}\.{field.name} must have a value"):
                kind(**options)


def test_an_empty_line_in_yaml_does_not_turn_the_projection_off(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("lora:\n  project:\n")
    error = fails(capsys, *TRAIN, "--config", tmp_path / "c.yaml", f"--out={tmp_path / 'x'}")
    assert "lora.project must have a value, got null" in error
    assert not (tmp_path / "x").exists()


def test_weights_that_train_nothing_are_refused_first(capsys, tmp_path):
    weights = [f"--objective.w_{name}=0" for name in ("safe", "suppress", "retain")]
    error = fails(capsys, *TRAIN, *weights, f"--out={tmp_path / 'x'}")
    assert "all weights are 0" in error
    assert not (tmp_path / "x").exists()


def test_settings_beside_a_path_are_said_to_have_no_effect(caplog, tmp_path):
    estimating.warn_of_path(config.SubspaceConfig(path=str(tmp_path), rank=5, width=64), {})
    assert "subspace.width, subspace.rank has no effect" in caplog.text
    caplog.clear()
    estimating.warn_of_path(config.SubspaceConfig(path=str(tmp_path)), {})
    estimating.warn_of_path(config.SubspaceConfig(rank=5), {})
    assert not caplog.text


def test_subspaces_of_other_sets_are_named(capsys, caplog, model, tmp_path):
    sets, folders = [], [tmp_path / "own", tmp_path / "run"]
    for name, words in (("forget", "abc"), ("retain", "defgh"), ("other", "ij")):
        sets.append(tmp_path / f"{name}.jsonl")
        sets[-1].write_text("".join(f'{{"question": "{w}?", "answer": "{w}"}}\n' for w in words))
    own = [f"--model.path={model}", f"--data.forget={sets[0]}", "--subspace.rank=4"]
    cli.main(["subspace", *own, f"--data.retain={sets[1]}", f"--out={folders[0]}"])
    of_run = config.SubspaceConfig(path=str(folders[0] / "subspaces"))
    train = ["train", *own[:2], f"--subspace.path={of_run.path}", "--train.steps=1"]
    cli.main([*train, f"--data.retain={sets[1]}", f"--out={folders[1]}"])
    assert "estimated on another" not in caplog.text
    copied = config.SubspaceConfig(path=str(folders[1] / "subspaces"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    same, other = (load_data(config.DataConfig(str(s), str(sets[1]))) for s in (sets[0], sets[2]))
    seen = estimating.estimated_on(tokenizer, other.forget, other.retain)
    for folder in (of_run, copied):
        caplog.clear()
        estimating.warn_of_path(folder, seen)
        assert "estimated on another forget set. " in caplog.text
    caplog.clear()
    reordered = estimating.estimated_on(tokenizer, same.forget[::-1], same.retain[::-1])
    estimating.warn_of_path(copied, reordered)
    assert not caplog.text
    estimating.warn_of_path(copied, {**reordered, "prompt": "Be kind. {}"})
    assert "estimated on another prompt. " in caplog.text


def test_a_subspace_that_leaves_next_to_nothing_open_is_said(caplog, model, tmp_path):
    sets = [tmp_path / f"{name}.jsonl" for name in ("forget", "retain")]
    for path, ends in zip(sets, ("?", "?x"), strict=True):
        rows = [{"question": f"{word}{ends}", "answer": word} for word in ("abc", "def")]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [f"--model.path={model}", f"--data.forget={sets[0]}", f"--data.retain={sets[1]}"]
    cli.main(["subspace", *own, "--subspace.energy=0.9999", f"--out={tmp_path / 'run'}"])
    assert "leave less than 1 % of the forget answers' energy open, such as model" in caplog.text


def test_a_device_without_weights_is_refused():
    with pytest.raises(ValueError, match=r"model\.device: 'meta' holds no weights"):
        load_model(config.ModelConfig("somewhere", device="meta"))


def test_more_directions_than_the_sketch_has_are_refused():
    with pytest.raises(ValueError, match=r"subspace\.rank must be at most subspace\.width, 512"):
        config.SubspaceConfig(rank=513)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["subspace", *TRAIN[1:], "--seed=-1"], "seed must be"),
        (["eval", "none", "--max_new_tokens=0"], "max_new_tokens must be"),
        (["eval", "none", "--examples=-1"], "examples must not be negative"),
        (["demo", "--seeds=0"], "seeds must be"),
        (["demo", "--out="], "out must be the path of a folder"),
        (["demo", "--probed=0"], "probed must be"),
        (["demo", "--stop=90"], "stop must be"),
        (["demo", "--examples=-1"], "examples must not be negative"),
        (["demo", "--max_seconds=0"], "max_seconds must be"),
        (["demo", "--lrs={lora: [0.1, -0.1]}"], "lrs: lora must not be negative"),
        (["demo", "--lrs={lora: []}"], "lrs: lora must list learning rates"),
    ],
)
def test_numbers_beside_the_sections_are_checked_first(
    capsys, tmp_path, monkeypatch, arguments, wanted
):
    monkeypatch.chdir(tmp_path)
    assert wanted in fails(capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["q_proj", "[q_proj]", '["q_proj"]'])
def test_one_target_is_a_plain_value(capsys, value):
    with pytest.raises(SystemExit):
        cli.main([*TRAIN, "--subspace.targets", value, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["subspace"]["targets"] in ("q_proj", ["q_proj"])
    assert config.SubspaceConfig(targets="q_proj").targets == ["q_proj"]


def test_variables_of_the_chat_template_are_flags(capsys):
    with pytest.raises(SystemExit):
        cli.main([*TRAIN, "--data.chat_template_kwargs.enable_thinking=false", "--print_config"])
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize("kind", run_config.SECTIONS.values(), ids=run_config.SECTIONS)
def test_every_field_has_a_help_text(kind):
    described = {p.arg_name for p in docstring_parser.parse(kind.__doc__).params if p.description}
    assert {field.name for field in fields(kind)} <= described


@pytest.mark.parametrize("command", ["eval", "merge", "verify"])
def test_a_path_given_for_a_whole_section_is_told_where_it_belongs(capsys, tmp_path, command):
    said = fails(capsys, command, tmp_path, "--model", "my/model")
    assert said.rstrip().endswith("got my/model. Did you mean --model.path my/model?")


def test_settings_that_a_scheduler_does_not_take_are_refused_first(capsys):
    said = fails(capsys, *TRAIN, "--train.lr_scheduler_kwargs={foo: 3}")
    assert "train.lr_scheduler_kwargs: linear does not take {'foo': 3}" in said


def test_the_base_model_has_no_adapter(capsys, tmp_path):
    said = fails(capsys, "eval", tmp_path, "--base=true", "--adapter=x")
    assert "adapter: x has no part in --base true" in said


@pytest.mark.parametrize("command", ["eval", "merge", "verify", "report"])
def test_a_run_that_is_not_there(capsys, tmp_path, command):
    assert f"run: no folder {tmp_path / 'x'}; give" in fails(capsys, command, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def copy(model, folder, without=()):
    folder.mkdir()
    for path in model.iterdir():
        if path.name not in without:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def make_unusable(kind, model, folder):
    """A folder with a fault; the words that the error must have."""
    if kind in (WhisperConfig, CLIPConfig):
        copy(model, folder, without=["config.json"])
        kind().save_pretrained(folder)
        return [f"{kind.__name__}, and of no language model"]
    if kind == "no folder":
        return [f"no folder {folder}"]
    if kind == "no config":
        copy(model, folder, without=["config.json"])
        return [str(folder), "no config.json"]
    if kind == "a file":
        folder.write_text("")
        return [f"{folder} is a file"]
    copy(model, folder)
    weights = folder / "model.safetensors"
    if kind == "deep config":
        (folder / "config.json").write_text('{"a":' * 100_000)
    elif kind == "deep tokenizer":
        (folder / "tokenizer.json").write_text("[" * 100_000)
    elif kind == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        torch.save({"a": print, "b": OSError}, folder / "pytorch_model.bin")
        weights.unlink()
    return [str(folder)]


UNUSABLE = ["no folder", "no config", "a file", "deep config", "deep tokenizer", "cut weights"]


@pytest.mark.parametrize("kind", [WhisperConfig, CLIPConfig, *UNUSABLE, "pickle"])
def test_a_model_that_cannot_be_used(capsys, model, tmp_path, kind):
    wanted = make_unusable(kind, model, tmp_path / "m")
    out = tmp_path / "run"
    error = fails(capsys, "train", f"--model.path={tmp_path / 'm'}", *SETS, f"--out={out}")
    assert "model.path" in error
    for words in wanted:
        assert words in error
    assert "huggingface.co" not in error
    assert len(error) < 600


def saved_run(folder, model):
    """A run's folder with its settings and a checkpoint's name."""
    folder.mkdir(exist_ok=True)
    (folder / "checkpoint-3").mkdir(exist_ok=True)
    parts = {
        "model": config.ModelConfig(str(model)),
        "data": config.DataConfig("authors:forget", "authors:retain"),
        "subspace": config.SubspaceConfig(),
        "lora": config.LoraConfig(),
        "objective": config.Objective(),
        "train": config.TrainConfig(steps=7),
    }
    text = yaml.safe_dump({name: asdict(part) for name, part in parts.items()})
    (folder / "config.yaml").write_text(text)
    return text


def test_resume_says_only_what_differs(capsys, model, tmp_path):
    saved_run(tmp_path, model)
    same = ["train", f"--model.path={model}", *SETS, f"--out={tmp_path}", "--resume=true"]
    error = fails(capsys, *same, "--train.lr=0.5", "--data.max_length=99", "--train.steps=7")
    assert "train.lr was 0.0005 and is 0.5; " not in error  # the order of the sections
    assert "data.max_length was 512 and is 99; train.lr was 0.0005 and is 0.5." in error
    for same_setting in ("weight_decay", "forget", "rank"):
        assert same_setting not in error


def test_resume_of_the_demo_says_only_what_differs(capsys, monkeypatch, tmp_path):
    def reached(*_):
        raise ValueError("reached")

    monkeypatch.setattr("nsru_train.demo.run.base_model", reached)
    demo = ["demo", f"--out={tmp_path}", "--train.steps=3"]
    assert "reached" in fails(capsys, *demo)
    assert "reached" in fails(capsys, *demo, "--resume=true")
    error = fails(capsys, *demo, "--resume=true", "--train.lr=0.1", "--stop=0.2")
    assert "train.lr was 0.0005 and is 0.1; demo.stop was None and is 0.2. Use" in error


def test_fields_that_a_method_lacks_are_said_before_any_work(capsys, caplog, model, tmp_path):
    say_once.cache_clear()
    sets = ["--data.forget=authors:forget", "--data.retain=authors:retain"]
    method = ["--method=altpo", f"--model.path={tmp_path / 'none'}", f"--out={tmp_path / 'x'}"]
    fails(capsys, "train", *sets, *method)
    assert "forget records have no alternatives; their safe targets stand in" in caplog.text
    caplog.clear()
    fails(capsys, "train", *sets, "--data.write_alternatives=2", *method)
    assert "alternatives" not in caplog.text
    one = tmp_path / "one.jsonl"
    one.write_text('{"question": "Who?", "answer": "Ann."}')
    sets = [f"--data.forget={one}", sets[1]]
    eco = fails(capsys, "train", *sets, "--method=eco", *method[1:])
    assert "data.forget: eco's prompt classifier needs two questions or more" in eco
    fails(capsys, "train", *sets, "--method=alter", "--data.write_alternatives=2", *method[1:])
    assert "alter: one domain for all records" in caplog.text


def test_a_comparison_is_given_by_its_file_alone(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("methods: [nsru, nsru]")
    sets = ["--model.path=m", "--data.forget=f.jsonl", "--data.retain=r.jsonl"]
    assert "expected methods of distinct names" in fails(
        capsys, "compare", tmp_path / "c.yaml", *sets, f"--out={tmp_path / 'x'}"
    )
    assert "compare: no file gone.yaml" in fails(capsys, "compare", "gone.yaml")


def test_a_moved_folder_goes_on_with_what_lies_in_it(tmp_path):
    def sections(folder):
        own = {"forget": f"{folder}/data/forget.jsonl", "more": {"holdout": f"{folder}/h.jsonl"}}
        return {"data": {**own, "retain": "elsewhere/retain.jsonl"}}

    moved = tmp_path / "moved"
    saved = RunFolder(moved).write_config(sections(tmp_path / "before"))
    run_config.check_same_run(saved, sections(moved))
    other = sections(moved)
    other["data"]["forget"] = f"{moved}/data/other.jsonl"
    with pytest.raises(ValueError, match=r"data\.forget was .*before/data/forget"):
        run_config.check_same_run(saved, other)
    with pytest.raises(ValueError, match=r"data\.forget was .*moved/data/forget"):
        run_config.check_same_run(RunFolder(moved).write_config(sections(moved)), sections("x"))


def test_settings_of_a_run_before_a_new_one_was_there(model, tmp_path):
    saved = yaml.safe_load(saved_run(tmp_path, model))
    for name in ("truncate", "system_prompt", "chat_template_kwargs"):
        del saved["data"][name]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    _, data = run_config.run_sections(str(tmp_path), None, None)
    assert data == config.DataConfig("authors:forget", "authors:retain")


def test_other_sets_are_asked_as_the_run_asked(model, tmp_path, caplog):
    saved = yaml.safe_load(saved_run(tmp_path, model))
    saved["data"] |= {"system_prompt": "You are a poet.", "max_length": 99, "truncate": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    sets = ("authors:retain", "authors:holdout")
    _, data = run_config.run_sections(str(tmp_path), None, config.DataConfig(*sets))
    assert data == config.DataConfig(*sets, system_prompt="You are a poet.", max_length=99)
    assert "as in the run, system_prompt 'You are a poet.', max_length 99" in caplog.text
    given = config.DataConfig(*sets, system_prompt="", max_length=98)
    _, data = run_config.run_sections(str(tmp_path), None, given)
    assert data == config.DataConfig(*sets, max_length=98)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (
            {"data": {"forget": "a", "retain": "b", "max_length": "long"}},
            "data.max_length: expected a whole number, got long; was",
        ),
        ({"data": {"forget": "a", "retain": "b", "more": ["c"]}}, "more"),
        ({"data": {"forget": "a", "retain": "b", "moer": {}}}, "moer"),
        ({"data": None}, "data"),
        ({"model": {"path": ["x"]}}, "path"),
        ({"model": {1: 2}}, ""),
    ],
)
def test_odd_values_in_a_runs_settings(capsys, model, tmp_path, change, wanted):
    saved = yaml.safe_load(saved_run(tmp_path, model))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved | change))
    error = fails(capsys, "eval", tmp_path)
    assert f"{tmp_path}/config.yaml" in error
    assert wanted in error


@contextmanager
def only_errors_that_name(path):
    """Let ValueErrors and OSErrors pass that hold the path, and nothing else."""
    try:
        yield
    except (ValueError, OSError) as error:
        if str(path) not in str(error):
            raise AssertionError(f"{error!r} does not name the file") from error


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_settings_of_a_run_are_named(tmp_path, data):
    text = saved_run(tmp_path, "a-model").encode()
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 30)))
        odd = [b"", b"\0", b"\xff", b"{", b"]", b"!!int ", b": ", b"&a ", b"*a", b"\n  - ", b"<<: "]
        piece = data.draw(
            st.sampled_from(odd) | st.just(text[start:end] * 2) | st.binary(max_size=3)
        )
        text = text[:start] + piece + text[end:]
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    with only_errors_that_name(path):
        found = run_config.run_sections(str(tmp_path), None, None)
        assert isinstance(found[0].path, str)
        assert isinstance(found[1].max_length, int)


def test_the_trainers_argument_is_said_as_a_flag(capsys, monkeypatch):
    def full():
        raise CheckpointError(28, "Free space and resume with resume_from_checkpoint=True", "c-8")

    monkeypatch.setitem(cli.COMMANDS, "env", full)
    assert "resume with --resume true" in fails(capsys, "env")


def test_what_safetensors_cannot_write_ends_in_one_line(capsys, monkeypatch):
    def full():
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setitem(cli.COMMANDS, "env", full)
    assert fails(capsys, "env").strip().endswith("No space left on device")


def test_files_of_other_kinds_and_long_texts(capsys, caplog, model, tmp_path):
    (tmp_path / "f.csv").write_text("id,q,a\n1,Who is Ann?,A poet.\n")
    long = {"prompt": "Who is Bob?", "completion": "A baker. " * 60}
    short = {"prompt": "Who is Eve?", "completion": "A clerk."}
    (tmp_path / "r.jsonl").write_text(json.dumps(long) + "\n" + json.dumps(short) + "\n")
    given = [
        f"--model.path={model}",
        f"--data.forget={tmp_path / 'f.csv'}",
        f"--data.retain={tmp_path / 'r.jsonl'}",
        "--data.max_length=240",
        f"--out={tmp_path / 'out'}",
    ]
    assert "'question' is missing; found: id, q, a" in fails(capsys, "subspace", *given)
    given[1] = f"--data.forget={tmp_path / 'g.csv'}"
    (tmp_path / "g.csv").write_text("id,question,answer\n1,Who is Ann?,A poet.\n")
    assert "raise max_length" in fails(capsys, "subspace", *given)
    cli.main(["subspace", *given, "--data.skip=true", "--subspace.rank=2"])
    said = [record.getMessage() for record in caplog.records]
    assert f"{tmp_path / 'g.csv'}: ignored columns: id." in said
    assert "data.skip: 1 of 2 retain records are too long and left out." in said


def test_options_of_transformers_reach_the_trainer(model, monkeypatch, tmp_path):
    seen = []
    train = NSRUTrainer.train

    def noted(trainer, **kwargs):
        seen.append(trainer.args)
        return train(trainer, **kwargs)

    monkeypatch.setattr(NSRUTrainer, "train", noted)
    sets = ("--data.forget=authors:forget?authors=3", "--data.retain=authors:retain?authors=3")
    cli.main(
        [
            *("train", f"--model.path={model}", *sets, "--data.max_length=900"),
            *("--train.steps=4", "--train.warmup=0", "--train.save_steps=0", "--train.lr=0.001"),
            *("--train.lr_scheduler_type=cosine", "--train.bf16=true", "--train.eval_steps=2"),
            "--train.lr_scheduler_kwargs={num_cycles: 1}",
            *("--train.report_to", "none", "--train.batch_size=2", f"--out={tmp_path}"),
            "--lora.project=false",
        ]
    )
    [arguments] = seen
    assert arguments.bf16
    assert not arguments.report_to
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if "lr" in row]
    cosine = [0.0005 * (1 + math.cos(math.pi * step / 2)) for step in range(5)]
    assert rates in (pytest.approx(cosine[:4]), pytest.approx(cosine[1:], abs=1e-12))
    evaluated = {row["step"]: row for row in rows if "eval_forget_prob" in row}
    assert set(evaluated) == {0, 2, 4}
    after = json.loads((tmp_path / "results.json").read_text())["methods"][-1]
    assert evaluated[4]["eval_safe_prob"] == pytest.approx(after["safe_prob"])


def scalars(folder):
    """Name of a curve -> step -> value, of what TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(folder.rglob("events.*")).parent)).Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_reported_is_right_and_stays_in_the_run(model, monkeypatch, tmp_path, name):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", "")  # to be put back after the test
    monkeypatch.delenv("WANDB_DIR")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = tmp_path / "run"
    sets = ("--data.forget=authors:forget?authors=3", "--data.retain=authors:retain?authors=3")
    cli.main(
        [
            *("train", f"--model.path={model}", *sets, "--data.max_length=900", f"--out={out}"),
            *("--train.steps=3", "--train.save_steps=0", "--train.eval_steps=2"),
            *("--lora.project=false", f"--train.report_to={name}"),
        ]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"run", "elsewhere"}
    assert not list((tmp_path / "elsewhere").iterdir())
    if name == "wandb":
        assert list(out.glob("wandb/offline-run-*/*.wandb"))
        return
    shown = scalars(out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for key in ("safe", "suppress", "retain", "total"):
        wanted = {row["step"]: row[key] for row in rows if key in row}
        assert shown[f"train/{key}"] == pytest.approx(wanted)
    for key in ("forget_prob", "safe_prob", "retain_prob"):
        wanted = {row["step"]: row[f"eval_{key}"] for row in rows if f"eval_{key}" in row}
        assert wanted.keys() == {0, 2, 3}
        assert shown[f"eval/{key}"] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [
        ("--train.report_to=wandbb", "train.report_to: 'wandbb' is unknown or its package"),
        ("--train.report_to=mlflow", "package is not installed: pip install mlflow"),
        ("--train.report_to=[none, all]", "train.report_to: 'all' goes with no other name, got"),
        ("--train.lr_scheduler_type=cosinus", "train.lr_scheduler_type"),
        ("--train.eval_steps=-1", "train.eval_steps must be 0 (none) or more"),
    ],
)
def test_options_of_transformers_are_checked_first(capsys, flag, wanted):
    assert wanted in fails(capsys, *TRAIN, flag)


def test_settings_of_another_method_are_no_defaults(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text("method: npo\nobjective: {beta: 0.3}")
    error = fails(capsys, *TRAIN, f"--config={path}", "--method=simnpo")
    assert f"{path}: its objective is that of npo, and simnpo is asked for" in error
    path.write_text("objective: {beta: 0.3}")
    assert "objective is that" not in fails(capsys, *TRAIN, f"--config={path}", "--method=simnpo")


def test_a_backend_of_the_environment_that_cannot_serve_is_refused_first(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    if torch.cuda.is_available():
        pytest.skip("it can serve here")
    monkeypatch.setenv("NSRU_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    error = fails(capsys, *TRAIN)
    assert "NSRU_BACKEND: 'triton' cannot serve: Triton kernels need tensors on a CUDA" in error


def test_a_config_that_the_locale_would_misread_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text("data: {system_prompt: 'Sé breve.'}", encoding="utf-8")
    monkeypatch.setattr(locale, "getpreferredencoding", lambda _: "ISO-8859-1")
    error = fails(capsys, *TRAIN, f"--config={path}")
    assert f"{path} is in UTF-8, and this locale would read it as ISO-8859-1" in error
    path.write_text("data: {system_prompt: Be brief.}")
    assert "UTF-8" not in fails(capsys, *TRAIN, f"--config={path}")


def test_a_console_without_the_letters_that_are_printed():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}

    def printed(*arguments):
        command = [sys.executable, "-m", "nsru_train.cli", *arguments]
        ran = subprocess.run(command, env=environment, capture_output=True, timeout=120)
        assert ran.returncode == 0, ran.stderr.decode()
        return ran.stdout

    assert b'a set {"question": "?"' in printed()
    config = printed("train", "--data.system_prompt=Sé → 日本", "--print_config")
    assert yaml.safe_load(config.decode("utf-8"))["data"]["system_prompt"] == "Sé → 日本"


def test_zero_3_is_refused_before_any_work(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert "deepspeed: ZeRO-3 keeps all weights in parts" in fails(capsys, *TRAIN)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    assert "ZeRO" not in fails(capsys, *TRAIN)


def test_layers_left_out_and_sizes_of_their_own(model, tmp_path, capsys):
    """From estimate to swap, export, evaluation, merge and check of the export."""
    out = tmp_path / "run"
    settings = {
        "subspace": {"exclude": "down_proj", "rank": 3, "width": 16},
        "lora": {"rank": 2, "rank_pattern": {"q_proj": 4, r".*\.mlp\..*": 3}},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    cli.main(
        [
            *("train", "--config", str(tmp_path / "c.yaml"), f"--model.path={model}"),
            "--data.forget=authors:forget?authors=3",
            "--data.retain=authors:retain?authors=3",
            *("--data.max_length=900", "--train.steps=4", "--train.batch_size=2"),
            *("--train.lr=0.02", "--objective.suppression=npo", "--objective.w_suppress=1"),
            *("--lora.alpha_pattern", "{v_proj: 5}", f"--out={out}"),
        ]
    )
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["subspace"]["exclude"] == ["down_proj"]
    assert saved["lora"]["rank_pattern"] == settings["lora"]["rank_pattern"]
    index = json.loads((out / "subspaces/index.json").read_text())
    openness = {name: e["editability"] for e in index["inputs"] for name in e["modules"]}
    ends = {name.rpartition(".")[2] for name in openness}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    adapted = AutoModelForCausalLM.from_pretrained(model)
    nk.load_lora_adapter(adapted, out / "adapter")
    found = {n: m for n, m in adapted.named_modules() if isinstance(m, nk.NSRULinear)}
    assert found.keys() == openness.keys()
    for name, module in found.items():
        end = name.rpartition(".")[2]
        assert module.rank == {"q_proj": 4, "gate_proj": 3, "up_proj": 3}.get(end, 2)
        alpha = 5 if end == "v_proj" else 16
        assert module.alpha == pytest.approx(alpha / math.sqrt(openness[name]))
    for command in ("merge", "verify", "eval"):
        cli.main([command, str(out), *(["--generate=false"] if command == "eval" else [])])
    assert "verify passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [
        ("--lora.rank_pattern={q_prj: 4}", "lora.rank_pattern has 'q_prj', which no target takes"),
        ("--lora.alpha_pattern={'q(': 4}", "lora.alpha_pattern: 'q(' is no regular expression"),
        ("--lora.rank_pattern={q_proj: 0}", "q_proj must be ≥ 1, got 0"),
        ("--lora.rank_pattern={q_proj: 4.5}", "lora.rank_pattern"),
        ("--lora.rank={q_proj: 4}", "lora.rank"),
        ("--lora.alpha=.nan", "alpha must be a finite number"),
        ("--subspace.exclude=q_prj", "exclude 'q_prj' matches no linear layer; closest: 'q_proj'"),
    ],
)
def test_slips_in_layers_are_told_before_anything_is_estimated(
    capsys, model, tmp_path, flag, wanted
):
    sets = ("--data.forget=authors:forget?authors=3", "--data.retain=authors:retain?authors=3")
    out = tmp_path / "run"
    error = fails(capsys, "train", f"--model.path={model}", *sets, flag, f"--out={out}")
    assert wanted in error
    assert not (out / "config.yaml").exists()


def test_sets_that_changed_since_training_are_said(caplog, model, tmp_path):
    def write(name, *answers):
        rows = ({"question": f"{name} {i}?", "answer": a} for i, a in enumerate(answers))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    for name in ("forget", "retain", "holdout"):
        write(name, "a", "b")
    sets = [f"--data.{name}={tmp_path / name}.jsonl" for name in ("forget", "retain")]
    more = json.dumps({"holdout": str(tmp_path / "holdout.jsonl")})
    out = tmp_path / "run"
    short = ("--subspace.rank=2", "--train.steps=1")
    cli.main(
        ["train", f"--model.path={model}", *sets, f"--data.more={more}", *short, f"--out={out}"]
    )

    def said(*command):
        caplog.clear()
        with suppress(SystemExit):  # verify finds that one step has unlearnt nothing
            cli.main([command[0], str(out), *command[1:]])
        return [line for r in caplog.records if "changed since" in (line := r.getMessage())]

    commands = (["eval", "--generate=false"], ["verify"])
    for command in commands:
        assert said(*command) == []
    write("forget", "a", "c")
    write("holdout", "a")
    for command in commands:
        (line,) = said(*command)
        assert line.startswith(f"run: forget and holdout changed since {out} was made")
        assert said(*command, *sets) == []  # asked for as they are
    results = json.loads((out / "results.json").read_text())
    for setup in ({**results["setup"], "sets": None}, {"questions": {}}, None):
        (out / "results.json").write_text(json.dumps({**results, "setup": setup}))
        assert said("verify") == []
    (out / "results.json").unlink()
    assert said("verify") == []


def test_a_resumed_run_says_from_where(capsys, model, tmp_path):
    command = ["train", f"--model.path={model}", *SETS, "--subspace.rank=2", f"--out={tmp_path}"]
    command += ["--train.steps=2", "--train.save_steps=1", "--train.batch_size=2"]
    cli.main(command)
    assert "resume:" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "checkpoint-2")
    cli.main([*command, "--resume=true"])
    assert f"resume: going on from {tmp_path / 'checkpoint-1'}.\n" in capsys.readouterr().out


def test_the_next_merge_removes_what_a_killed_one_left(capsys, model, tmp_path):
    saved_run(tmp_path, model)
    network = AutoModelForCausalLM.from_pretrained(model)
    nk.swap_linears(network, "q_proj", rank=2, alpha=4)
    nk.save_lora_adapter(network, tmp_path / "adapter")
    left = tmp_path / ".merged.0123abcd" / "model.safetensors"
    left.parent.mkdir()
    left.touch()
    cli.main(["merge", str(tmp_path)])
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"config.yaml", "adapter", "merged", "checkpoint-3"}
    # Not while another process may be writing there.
    owner = {"pid": os.getppid(), "host": socket.gethostname()}
    (tmp_path / ".lock").write_text(json.dumps(owner))
    left.parent.mkdir()
    assert "is in use by process" in fails(capsys, "merge", tmp_path)
    assert left.parent.exists()


@pytest.mark.parametrize(
    ("command", "left", "wanted"),
    [
        ("train", None, "no checkpoint yet"),
        ("train", "subspaces/index.json", "--subspace.path=OUT/subspaces"),
        ("train", "checkpoint-5/trainer_state.json", "OUT/checkpoint-5 is kept."),
        ("compare", None, "What was finished is kept. To go on: nsru compare"),
        ("subspace", None, "the same command starts again"),
        ("refresh", None, "`nsru report` draws what is missing"),
    ],
)
def test_an_interrupt_says_what_is_kept(
    model, tmp_path, monkeypatch, capsys, command, left, wanted
):
    @wraps(cli.COMMANDS[command])
    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, command, interrupted)
    if left is not None:
        (tmp_path / left).parent.mkdir()
        (tmp_path / left).write_text("{}")
    sets = [f"--model.path={model}", "--data.forget=authors:forget", "--data.retain=authors:retain"]
    given = [str(tmp_path)] if command == "refresh" else sets
    with pytest.raises(SystemExit) as stop:
        cli.main([command, *given, f"--out={tmp_path}"])
    assert stop.value.code == 130
    said = capsys.readouterr().err
    assert wanted.replace("OUT", str(tmp_path)) in said
    assert "Traceback" not in said
    if command in ("train", "compare") and (left is None or "checkpoint" in left):
        assert said.rstrip().endswith("--resume=true") == (command == "compare" or bool(left))


def test_nsru_alone_says_where_to_begin(capsys):
    cli.main([])
    assert "nsru demo          begin here" in capsys.readouterr().out
    cli.main(["--version"])
    assert capsys.readouterr().out == f"nsru-kernels {nk.__version__}\n"
