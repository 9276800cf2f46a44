"""The scripts of examples/ run as they are, on a tiny model that knows the questions."""

import contextlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from samples import make_tokenizer

from nsru_train.cli import main
from nsru_train.demo.tiny_model import make_llama, memorise
from nsru_train.sources import load_records

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SETS = ("forget", "retain", "retain_unseen")

pytestmark = pytest.mark.usefixtures("module_without_figures", "short_answers")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder in place of SmolLM2's."""
    folder = tmp_path_factory.mktemp("model")
    records = [qa for name in SETS for qa in load_records(EXAMPLES / "paris" / f"{name}.jsonl")]
    tokenizer = make_tokenizer(records, 600)
    tiny = make_llama(tokenizer, hidden_size=64, layers=2, intermediate_size=128)
    quick = {"epochs": 80, "lr": 5e-3, "target_nll": 0.03, "batch_size": 16, "progress": False}
    assert memorise(tiny, tokenizer, records, **quick)["reached"]
    for part in (tiny, tokenizer):
        part.save_pretrained(folder)
    return str(folder)


def run_script(monkeypatch, capsys, name, *arguments):
    """What the script prints."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    monkeypatch.syspath_prepend(EXAMPLES)  # as Python does for a script
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def called(folder, *arguments):
    """Programs and their arguments that the shell script calls, without what they do."""
    for name in ("nsru", "python"):
        stub = folder / name
        stub.write_text(f'#!/bin/sh\necho {name} >> calls\nfor a; do echo "$a" >> calls; done\n')
        stub.chmod(0o755)
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    script = ["sh", EXAMPLES / "unlearn_cli.sh", *arguments]
    subprocess.run(script, env=os.environ | path, cwd=folder, check=True)
    words = (folder / "calls").read_text().splitlines()
    starts = [i for i, word in enumerate(words) if word in ("nsru", "python")]
    return [words[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)]


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """The run of the shell script, with what was printed beside it."""
    folder = tmp_path_factory.mktemp("cli")
    with (folder / "printed").open("w") as printed, contextlib.redirect_stdout(printed):
        for program, *arguments in called(folder, model, folder / "run", "--train.lr", "4e-3"):
            assert program == "nsru"
            main(arguments)
    return folder / "run"


def forgets(before, after):
    """A model this small has little room, so that what it keeps falls as well."""
    assert before["forget_prob"] > 0.9
    assert after["forget_prob"] < 0.4
    assert after["retain_prob"] > 2 * after["forget_prob"]


def test_the_shell_script_gets_the_default_model_first(tmp_path):
    fetch, train, evaluation = called(tmp_path)
    assert fetch == ["python", "-m", "nsru_train.demo.smollm2", "--base-only"]
    assert train[:4] == ["nsru", "train", "--model.path", "runs/smollm2/base"]
    assert evaluation[:3] == ["nsru", "eval", "runs/paris"]


def test_the_command_line(run):
    rows = json.loads((run / "results.json").read_text())["methods"]
    forgets(*rows)
    printed = (run.parent / "printed").read_text()
    for name, row in zip(("before", "after"), rows, strict=True):
        shown = [f"{row[f'{part}_prob']:.4f}" for part in (*SETS, "safe")]
        assert re.search(rf"^{name} +{' +'.join(shown)}$", printed, re.MULTILINE)
    metrics = json.loads((run / "eval" / "results.json").read_text())["metrics"]
    assert metrics["retain_unseen"]["count"] == 12
    assert metrics["forget"]["reworded_probability"] < 0.5


def test_export_and_serve(run, monkeypatch, capsys):
    printed = run_script(monkeypatch, capsys, "export_and_serve.py", run)
    found = {
        name: float(difference)
        for name, difference in re.findall(r"^  (\w+) +logits differ .*? by (\S+)", printed, re.M)
    }
    assert found.pop("base") > 0.1
    assert found.keys() == {"PEFT", "transformers", "merged"}
    assert max(found.values()) < 1e-3


def test_python(model, monkeypatch, capsys, tmp_path, recwarn):
    given = ("--model", model, "--out", tmp_path, "--lr", "4e-3")
    printed = run_script(monkeypatch, capsys, "unlearn_python.py", *given)
    assert not [w for w in recwarn if "pin_memory" in str(w.message)], "said without a GPU"
    (sets,) = re.findall(r"^probability of answers (.*)$", printed, re.MULTILINE)
    names = [f"{name}_prob" for name in sets.split()]
    rows = re.findall(r"^(?:before|after) +(\d.*)$", printed, re.MULTILINE)
    forgets(*(dict(zip(names, map(float, row.split()), strict=True)) for row in rows))
    assert "before: The capital of France is Paris." in printed
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_own_method(model, monkeypatch, capsys, tmp_path):
    flags = (f"--model.path={model}", f"--out={tmp_path}", "--train.lr=4e-3")
    run_script(monkeypatch, capsys, "own_method.py", *flags, "--objective.ceiling=4")
    before, after = json.loads((tmp_path / "results.json").read_text())["methods"]
    assert after["method"] == "Ceiling projected"
    forgets(before, after)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert -4 <= min(line["forget"] for line in lines if "forget" in line) < -2, "up to the ceiling"


def test_compare(model, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    config = EXAMPLES / "compare.yaml"
    flags = (f"--model.path={model}", f"--out={tmp_path}", "--train.steps=4")
    main(["compare", f"--config={config}", *flags])
    rows = json.loads((tmp_path / "results.json").read_text())["methods"]
    wanted = yaml.safe_load(config.read_text())["methods"]
    assert [row["method"] for row in rows] == ["before", *wanted]


def test_the_table_names_every_script():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".yaml")}
    assert set(re.findall(r"^\| \[([\w.]+)\]", table, re.MULTILINE)) == scripts
