"""nsru compare: methods on one model, tuned alike, resumed, in one table and one report."""

import json
import math
import shutil
from pathlib import Path

import pytest
import samples

from nsru_train import compare
from nsru_train.cli import main
from nsru_train.compare import Contender
from nsru_train.methods import METHODS
from nsru_train.sources import save_records

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("setting")
    samples.save_tiny(folder / "model", samples.RECORDS, heads=2, kv_heads=1)
    save_records(folder / "forget.jsonl", samples.FORGET[:3])
    save_records(folder / "retain.jsonl", samples.RETAIN)
    sets = [f"--data.{name}={folder / name}.jsonl" for name in ("forget", "retain")]
    quick = ["--train.steps=2", "--train.batch_size=3", "--seeds=1", "--examples=0"]
    return ["compare", f"--model.path={folder / 'model'}", *sets, *quick, "--lrs=[0.01, 0.02]"]


@pytest.fixture(scope="module")
def out(flags, tmp_path_factory, short_answers):
    folder = tmp_path_factory.mktemp("compare") / "run"
    logs = f"--logs={{theirs: {write_log(folder.parent / 'theirs', samples.FORGET[:3])}}}"
    main([*flags, "--methods=[nsru, npo, npo projected]", logs, f"--out={folder}"])
    return folder


def write_log(folder, records, **changes):
    """An evaluation by OpenUnlearning, of the questions that it asked by another template."""
    said = {
        str(i): {"input": f"user {qa.question}", "ground_truth": qa.answer, "generation": "I"}
        for i, qa in enumerate(records)
    }
    losses = {str(i): {"avg_loss": 1.0} for i in range(len(records))}
    log = {
        "forget_Q_A_Prob": {"agg_value": math.exp(-1), "value_by_index": losses},
        "forget_Q_A_ROUGE": {"agg_value": 0.0, "value_by_index": said},
        "privleak": {"agg_value": -7.0},
        **changes,
    }
    folder.mkdir()
    (folder / "TOFU_EVAL.json").write_text(json.dumps(log))
    return folder


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


def test_every_method_has_the_same_rates_and_its_row(out):
    results = read_results(out)
    names = ["nsru", "npo", "npo projected"]
    *rows, log = results["methods"]
    assert [row["method"] for row in rows] == ["before", *names]
    assert log == {
        "method": "theirs", "privleak": -7.0, "forget_rougeL_recall": 0.0,
        "forget_prob": pytest.approx(math.exp(-1)),
    }  # fmt: skip
    retain, split, prompt = results["notes"]
    assert split == "Retain answers of the logs are all of them, of the methods every other."
    assert "its retain questions are not, or not known to be, those" in retain
    assert prompt.startswith("theirs: it asks by 'user Where")
    for name in names:
        assert {row["lr"] for row in results["tuning"] if row["method"] == name} == {0.01, 0.02}
    ranks = {row["method"]: row["mean_retain_rank"] for row in rows[1:]}
    assert ranks["npo"] == 0 < ranks["npo projected"] == ranks["nsru"]
    assert results["setup"]["methods"]["npo"]["beta"] == 0.1
    assert results["setup"]["questions"] == {"forget": 3, "retain": 4, "retain_unseen": 3}
    assert all(row[f"{name}_damage"] is not None for row in results["matched"] for name in names)
    assert "npo projected" in (out / "report.html").read_text()


def test_an_attack_on_one_of_its_runs_gives_columns(out, flags, capsys):
    before = {row["method"]: row for row in read_results(out)["methods"]}
    run = out / "runs" / f"npo-{before['npo']['lr']:g}-0"
    options = ["--attacks=[sample, relearn]", "--samples=1", "--max_new_tokens=3", "--steps=1"]
    main(["attack", str(run), *options, f"--retain_model={flags[1].partition('=')[2]}"])
    attacked = read_results(run / "attack")["methods"][1]
    main([*flags, "--methods=[nsru, npo, npo projected]", f"--out={out}", "--resume=true"])
    rows = {row["method"]: row for row in read_results(out)["methods"]}
    assert not any(key.startswith("robustness") for key in rows["nsru"])
    for key in ("robustness_asking", "robustness_relearning"):
        assert rows["npo"][key] == attacked[key]
    assert {k: v for k, v in rows["npo"].items() if k in before["npo"]} == before["npo"]


def test_an_interrupted_comparison_keeps_what_it_has(out, flags, monkeypatch, capsys):
    (out / "results.json").unlink()
    trained = []
    whole = compare.unlearn
    monkeypatch.setattr(
        compare, "unlearn", lambda *args, **kw: trained.append(args[3].name) or whole(*args, **kw)
    )
    more = ["--methods=[nsru, npo, npo projected, idk]", f"--out={out}", "--resume=true"]
    main([*flags, *more])
    assert trained == ["idk-0.01-0", "idk-0.02-0"]
    # Not over what an interrupted one has finished, either.
    Path(out, "results.json").rename(Path(out, "kept.json"))
    with pytest.raises(SystemExit):
        main([*flags, *more[:2]])
    assert "finished runs of a comparison that was interrupted" in capsys.readouterr().err
    Path(out, "kept.json").rename(Path(out, "results.json"))
    # A run of it is repaired with the comparison's subspaces.
    main(
        ["refresh", str(Path(out, "runs", "npo-projected-0.01-0")), "--steps=1", "--control=false"]
    )
    assert [row["method"] for row in read_results(out)["methods"]][-1] == "idk"
    with pytest.raises(SystemExit):
        main([*flags, *more, "--settings={npo: {beta: 0.5}}"])
    assert "methods.npo was" in capsys.readouterr().err
    for option in ("--probed=2", "--stop=0.5"):
        with pytest.raises(SystemExit):
            main([*flags, *more, option])
        assert f"compare.{option[2:].partition('=')[0]} was" in capsys.readouterr().err


@pytest.fixture
def finished(out, flags, tmp_path):
    """A comparison beside copies of its model and sets, which a test may change."""
    before = [flag.partition("=")[2] for flag in flags if flag.startswith(("--model", "--data"))]
    moved = [flag.replace(str(Path(before[0]).parent), str(tmp_path)) for flag in flags]
    shutil.copytree(Path(before[0]).parent, tmp_path, dirs_exist_ok=True)
    command = [*moved, "--methods=[nsru]", "--lrs=[]", f"--out={tmp_path / 'run'}"]
    main(command)
    return tmp_path, [*command, "--resume=true"]


def test_steps_that_a_method_does_not_keep_do_not_count(out, flags, tmp_path):
    """A rate is not chosen for what its guard threw away, nor compared by it."""
    finished = shutil.copytree(out, tmp_path / "run")
    for lr, kept in (("0.01", 1), ("0.02", 0)):
        path = finished / "runs" / f"npo-{lr}-0" / "results.json"
        run = json.loads(path.read_text())
        run["outcome"]["kept_step"] = kept
        start = run["frontier"][0]
        run["frontier"] = [
            {**start, "step": 0},
            {**start, "step": 1, "forget_prob": 0.09 + float(lr)},
            {**start, "step": 2, "forget_prob": 1e-6},
        ]
        path.write_text(json.dumps(run))
    shutil.rmtree(finished / "runs" / "npo-0.01-0" / "judged", ignore_errors=True)
    main([*flags, "--methods=[nsru, npo, npo projected]", f"--out={finished}", "--resume=true"])
    results = read_results(finished)
    assert results["setup"]["lr"]["npo"] == 0.01
    assert [p["step"] for p in results["frontier"] if p["method"] == "npo"] == [0, 1]
    [row] = [row for row in results["methods"] if row["method"] == "npo"]
    assert row["forget_prob"] == pytest.approx(0.1)


def test_a_comparison_does_not_go_on_with_other_data_or_prompts(finished, capsys):
    folder, again = finished
    main(again)
    capsys.readouterr()
    records = (folder / "forget.jsonl").read_text()
    (folder / "forget.jsonl").write_text(records.replace('answer": "', 'answer": "Well, '))
    with pytest.raises(SystemExit):
        main(again)
    assert "compare.sets was {'forget': " in capsys.readouterr().err
    (folder / "forget.jsonl").write_text(records)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "model" / "chat_template.jinja").write_text(template)
    with pytest.raises(SystemExit):
        main(again)
    assert "compare.prompt was 'Question: {}\\nAnswer:' and is 'user: {}" in capsys.readouterr().err


def test_the_page_says_of_how_many_questions_the_probabilities_are(flags, tmp_path):
    main([*flags, "--methods=[nsru]", "--lrs=[]", "--probed=2", f"--out={tmp_path}"])
    setup = read_results(tmp_path)["setup"]
    assert setup["questions"] == {"forget": 2, "retain": 2, "retain_unseen": 2}
    assert setup["sizes"] == {"forget": 3, "retain": 4, "retain_unseen": 3}
    assert "2 of 3 questions" in " ".join((tmp_path / "report.html").read_text().split())


@pytest.mark.parametrize("name", ["nsru", "lora", *list(METHODS)[1:], "ihl projected"])
def test_a_contender_is_called_as_results_call_it(name):
    contender = Contender.named(name, {})
    assert contender.name == name
    assert contender.project == (name in ("nsru", "ihl projected"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods=[nsru, npoo]"], "got 'npoo'. Did you mean npo?"),
        (["--methods=[npo twice]"], "expected a name, or \"NAME projected\", got 'npo twice'"),
        (["--methods=[before]"], "'before' is the base model"),
        (["--methods=[npo, npo]"], "expected methods of distinct names"),
        (["--methods=[npo]", "--settings={simnpo: {}}"], "settings: 'simnpo' is none of the"),
        (
            ["--methods=[npo]", "--settings={npo: {bet: 1}}"],
            "settings: npo has w_forget, w_retain, retain, compat, beta, got bet",
        ),
        (
            ["--methods=[npo]", "--settings={npo: {beta: 0}}"],
            "settings: npo: objective.beta must be positive, got 0",
        ),
        (
            ["--methods=[nsru_train.methods.npo:NPO]", "--settings={NPO: {beta: 1}}"],
            "settings: 'NPO' is none of the methods, nsru_train.methods.npo:NPO",
        ),
        (
            [
                "--methods=[nsru_train.methods.npo:NPO]",
                "--settings={nsru_train.methods.npo:NPO: {beta: 0}}",
            ],
            "settings: nsru_train.methods.npo:NPO: objective.beta must be positive, got 0",
        ),
    ],
)
def test_mistakes_are_refused_before_any_work(flags, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        main([*flags, *options, f"--out={tmp_path / 'never'}"])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_logs_that_cannot_stand_beside_are_named_before_any_work(flags, tmp_path, capsys):
    forget = samples.FORGET[:3]
    wrong = {"forget_Q_A_Prob": {"agg_value": 0.5, "value_by_index": {"0": {"avg_loss": 1.0}}}}
    few = {"forget_Q_A_Prob": {"value_by_index": {"0": {"avg_loss": 1.0}}}}
    cases = {
        "another": (samples.RETAIN[:3], {}, "another: it is of another forget set: 3 questions"),
        "wrong": (forget, wrong, "of different questions"),
        "few": (forget, few, "of different questions"),
        "stale": (forget, {"forget_Q_A_ROUGE": {"agg_value": 0.5}}, "must hold items"),
        "npo": (forget, {}, "logs: 'npo' is the name of another row"),
    }
    for name, (records, changes, message) in cases.items():
        folder = write_log(tmp_path / name, records, **changes)
        with pytest.raises(SystemExit):
            main([
                *flags, "--methods=[npo]", f"--logs={{{name}: {folder}}}",
                f"--out={tmp_path / 'never'}",
            ])  # fmt: skip
        assert message in capsys.readouterr().err, name
    odd = write_log(tmp_path / "odd", forget, privleak={"agg_value": "low"})
    with pytest.raises(SystemExit):
        main([*flags, f"--logs={{odd: {odd}}}", f"--out={tmp_path / 'never'}"])
    assert "its privleak is no number, got 'low'" in capsys.readouterr().err
    path = tmp_path / "npo" / "TOFU_EVAL.json"
    log = json.loads(path.read_text())
    log["forget_Q_A_Prob"]["agg_value"] = 0.5
    path.write_text(json.dumps(log))
    with pytest.raises(SystemExit):
        main([*flags, f"--logs={{theirs: {path}}}", f"--out={tmp_path / 'never'}"])
    assert "its forget_Q_A_Prob says 0.5, its items give 0.3678" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_a_rate_at_which_a_method_diverges_costs_nothing_else(flags, tmp_path, capsys):
    rates = ["--lrs=[0.01, 1.0e+38, 0.010]", "--methods=[nsru, ga]", f"--out={tmp_path / 'run'}"]
    main([flag for flag in flags if not flag.startswith("--lrs")] + rates)
    assert "ga seed 0, lr 1e+38: left out" in capsys.readouterr().out
    results = read_results(tmp_path / "run")
    assert [row["method"] for row in results["methods"]] == ["before", "nsru", "ga"]
    assert {row["lr"] for row in results["tuning"]} == {0.01}
    assert len(results["tuning"]) == len({(r["method"], r["step"]) for r in results["tuning"]})
