"""The demo at a size that takes seconds: every part is there, and sets are what they claim."""

import itertools
import json
from dataclasses import replace

import pytest

from nsru_train.cli import main
from nsru_train.config import DEFAULT_MIN_EDITABILITY
from nsru_train.data.records import check_disjoint, shared_questions
from nsru_train.data.safe_targets import SafeTargets
from nsru_train.demo import run as demo
from nsru_train.demo.sets import fictitious_sets, tofu_sets

TINY = replace(
    demo.FICTITIOUS, authors=6, vocab_size=300, hidden_size=32, layers=1, intermediate_size=48,
    epochs=2, eval_steps=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory, short_answers):
    folder = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "FICTITIOUS", TINY)
        main(["demo", f"--out={folder}", "--seeds=2", "--train.steps=4", "--examples=2"])
    return folder


@pytest.fixture(scope="module")
def results(out):
    return json.loads((out / "results.json").read_text())


def test_methods(results):
    assert (results["schema"], results["kind"]) == (1, "demo")
    assert results["seconds"] > 0
    runs = [(row["method"], row["seed"]) for row in results["methods"]]
    assert runs == [("before", 0), ("nsru", 0), ("lora", 0), ("nsru", 1), ("lora", 1)]
    for row in results["methods"]:
        for name in ("forget_prob", "safe_prob", "retain_prob", "retain_unseen_prob"):
            assert 0 <= row[name] <= 1, (row["method"], name)
        assert 0 <= row["model_utility"] <= 1
        assert 0 <= row["forget_safe_rougeL_recall"] <= 1
    for row in results["methods"][1:]:
        assert row["step_seconds"] > 0
        assert row["peak_bytes"] > 1 << 20


def test_frontier_has_every_evaluation(results):
    for method, seed in itertools.product(("nsru", "lora"), (0, 1)):
        steps = [
            row["step"]
            for row in results["frontier"]
            if (row["method"], row["seed"]) == (method, seed)
        ]
        assert steps == [0, 2, 4]
    starts = [row["forget_prob"] for row in results["frontier"] if row["step"] == 0]
    assert starts == pytest.approx([results["methods"][0]["forget_prob"]] * 4, rel=1e-5)


def test_lora_is_not_projected_and_nsru_is(results):
    ranks = {row["method"]: row["mean_retain_rank"] for row in results["methods"][1:]}
    assert ranks["lora"] == 0
    assert ranks["nsru"] > 0
    leakage = [row["leakage"] for row in results["leakage"]]
    assert 0 < max(leakage) < 1e-6
    for row in results["subspaces"]:
        assert row["rank"] >= 1
        assert row["editability"] <= 1
        assert row["editability"] >= DEFAULT_MIN_EDITABILITY or row["rank"] == 1


def test_examples_come_from_both_sides(results):
    assert {row["split"] for row in results["examples"]} == {"forget", "retain_unseen"}
    assert all({"before", "nsru", "lora"} <= set(row) for row in results["examples"])


def test_files(out):
    for name in ("report.html", "config.yaml", "environment.json", "adapter/adapter_config.json"):
        assert (out / name).is_file(), name
    assert list((out / "figures").glob("*.png"))
    assert len((out / "metrics.jsonl").read_text().splitlines()) > 16


def test_other_commands_work_on_its_folder(out):
    main(["eval", str(out), "--generate=false"])
    metrics = json.loads((out / "eval" / "results.json").read_text())["metrics"]
    assert {"forget", "retain", "retain_unseen", "holdout"} <= set(metrics)


def test_a_second_run_takes_the_same_base_model(out, capsys):
    assert json.loads((out / "base" / "recipe.json").read_text())["scale"]["layers"] == TINY.layers
    model, tokenizer = demo.base_model(
        out / "base", fictitious_sets(6, SafeTargets.from_file()).memorised, TINY, 1.0, False
    )
    assert "using the model" in capsys.readouterr().out
    assert model.config.hidden_size == 32
    assert len(tokenizer) <= 300


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_model_is_memorised_in_bf16_only_where_that_is_fast(tmp_path, monkeypatch, has_bf16):
    used = []

    def memorise(*args, bf16, **kwargs):
        used.append(bf16)
        return {"seconds": 0.0, "probability": 0.0}

    monkeypatch.setattr(demo, "has_bf16_products", lambda: has_bf16)
    monkeypatch.setattr(demo, "memorise", memorise)
    records = fictitious_sets(6, SafeTargets.from_file()).memorised
    demo.base_model(tmp_path, records, replace(TINY, bf16=True), 1.0, False)
    assert used == [has_bf16]
    assert json.loads((tmp_path / "recipe.json").read_text())["scale"]["bf16"] == has_bf16


def check_sets(sets):
    groups = sets.authors
    assert groups.keys() == vars(sets).keys() - {"general"}
    for first, second in itertools.combinations(groups, 2):
        assert not shared_questions(groups[first], groups[second]), (first, second)
    check_disjoint(sets.forget, [*sets.retain, *sets.retain_unseen, *sets.retain_untouched])
    assert not {qa.question for qa in sets.holdout} & {qa.question for qa in sets.memorised}


def test_fictitious_sets_are_disjoint():
    check_sets(fictitious_sets(30, SafeTargets.from_file()))


def test_tofu_sets_are_disjoint(shared_data):
    sets = tofu_sets(str(shared_data / "tofu"), 40, SafeTargets.from_file())
    check_sets(sets)
    assert len(sets.forget) == 40
    kept = [*sets.retain, *sets.retain_unseen, *sets.retain_untouched]
    assert len(kept) == 38 * 20 - 2  # two authors are asked the same
    assert sum(bool(qa.perturbed_answers) for qa in sets.retain) == 200
