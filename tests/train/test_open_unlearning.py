"""OpenUnlearning's numbers: from two of its published logs, and by hand."""

import copy
import gzip
import json
import logging
import math

import numpy as np
import pytest

from nsru_train.eval_run import RetainLog
from nsru_train.metrics.open_unlearning import (
    aggregates,
    comparison_row,
    read_log,
    rel_diff,
    rouge_recalls,
    same_questions,
    summary,
    texts,
    to_log,
    zlib_scores,
)


@pytest.fixture
def read(shared_data):
    """A published log, by the end of its name."""

    def published(name):
        path = shared_data / "open_unlearning_logs" / f"llama3.2-1b_{name}.json.gz"
        if not path.is_file():
            pytest.skip(f"OpenUnlearning's log is not there: {path}")
        return json.loads(gzip.decompress(path.read_bytes()))

    return published


@pytest.mark.parametrize("name", ["full_forget10", "retain90"])
def test_every_published_aggregate_follows_from_its_items(name, read):
    log, retain = read(name), read("retain90")
    found = aggregates(log, None if name == "retain90" else retain)
    for metric, content in log.items():
        value = content["agg_value"]
        if metric == "forget_quality":
            continue
        assert found.pop(metric) == pytest.approx(value, rel=1e-6, abs=1e-6), metric
    if name == "retain90":
        assert found == {"memorization": pytest.approx(0.5848, abs=5e-5)}
        assert aggregates(log, log)["forget_quality"] == 1
        return
    quality = math.log10(log["forget_quality"]["agg_value"])
    assert math.log10(found.pop("forget_quality")) == pytest.approx(quality, rel=1e-6)
    aucs = [(log[f"mia_{a}"]["agg_value"], retain[f"mia_{a}"]["agg_value"])
            for a in ("loss", "zlib", "min_k", "min_k_plus_plus", "gradnorm")]  # fmt: skip
    close = [1 - abs(auc - reference) / max(reference, 1 - reference) for auc, reference in aucs]
    assert found == {
        "memorization": pytest.approx(0.0868, abs=5e-5),
        "privacy": pytest.approx(5 / sum(1 / part for part in close), rel=1e-9),
    }
    assert aggregates(retain, retain)["privacy"] == 1


@pytest.mark.parametrize("name", ["full_forget10", "retain90"])
def test_texts_give_the_scores_of_their_items(name, read):
    log = read(name)
    for group in ("forget", "retain", "ra", "wf"):
        metric = f"{group}_Q_A_ROUGE"
        items = log[metric]["value_by_index"]
        for index, recall in rouge_recalls(log, metric).items():
            assert recall == pytest.approx(items[index]["rougeL_recall"], abs=1e-9)
    texts = [v["ground_truth"] for v in log["forget_Q_A_ROUGE"]["value_by_index"].values()]
    losses, wanted = (
        [v["score"] for v in log[f"mia_{attack}"]["forget"]["value_by_index"].values()]
        for attack in ("loss", "zlib")
    )
    np.testing.assert_allclose(zlib_scores(losses, texts), wanted, rtol=1e-12)


def test_the_texts_of_a_log_are_those_of_the_set(read, shared_data):
    path = shared_data / "tofu" / "forget10.json"
    if not path.is_file():
        pytest.skip(f"TOFU is not there: {path}")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = [(record["question"], record["answer"]) for record in records]
    log = read("full_forget10")
    assert same_questions(log, "forget", pairs)
    assert not same_questions(log, "forget", [*pairs[1:], pairs[0]])
    assert not same_questions(log, "retain", pairs)
    row = comparison_row(log, {"forget": pairs, "retain": texts(log, "retain")})
    assert row["forget_quality"] == log["forget_quality"]["agg_value"]
    assert row["privleak"] == log["privleak"]["agg_value"]
    assert row["retain_prob"] == pytest.approx(0.8706601643562317, abs=1e-6)
    row = comparison_row(log, {"forget": pairs, "retain": pairs})
    assert row["forget_prob"] == pytest.approx(0.8804820564, abs=1e-6)
    assert "retain_prob" not in row


def test_a_retain_log_without_texts_is_said(read):
    whole = read("retain90")
    bare = {key: value for key, value in whole.items() if "ROUGE" not in key}
    for log, count in ((whole, 0), (bare, 1)):
        notes = RetainLog("retain90", theirs=log).notes({"compared": "", "prompt": ""})
        assert sum("only their number was compared" in note for note in notes) == count


def test_a_retain_log_that_lacks_an_item_is_refused(read):
    log, cut = read("retain90"), read("retain90")
    del cut["forget_Q_A_PARA_Prob"]["value_by_index"]["7"]
    with pytest.raises(ValueError, match=r"'7' is missing in one of them .* damaged, or was cut"):
        aggregates(log, cut)


def test_losses_of_the_retain_model_are_the_reference_of_the_reference_attack(read):
    """OpenUnlearning's run had the reference model in memory, where bf16 rounds otherwise."""
    scores = {
        (name, part): np.array([v["score"] for v in log[metric][part]["value_by_index"].values()])
        for name, metric, log in (
            ("loss", "mia_loss", read("full_forget10")),
            ("wanted", "mia_reference", read("full_forget10")),
            ("retain", "mia_loss", read("retain90")),
        )
        for part in ("forget", "holdout")
    }
    for part in ("forget", "holdout"):
        difference = scores["loss", part] - scores["retain", part]
        np.testing.assert_allclose(difference, scores["wanted", part], atol=0.06)


def items(*values):
    return {"value_by_index": {str(i): value for i, value in enumerate(values)}}


def losses(*values):
    return items(*({"avg_loss": value} for value in values))


def scores(*values):
    return items(*({"score": value} for value in values))


def small_log():
    """Two questions a set; p = 1/2 where a loss is LOG2."""
    log2, log4 = math.log(2), math.log(4)
    said = items(
        {"ground_truth": "Ann of Oslo", "generation": "It is Ann"},
        {"ground_truth": "Bob", "generation": "Bob"},
    )
    log = {
        "forget_Q_A_Prob": losses(log2, log4),
        "forget_Q_A_PARA_Prob": losses(log2, log4),
        "forget_Q_A_PERT_Prob": losses([log2, log2], [log2, log2, log2]),
        "forget_truth_ratio": {},
        "exact_memorization": scores(0.5, 0.0),
        "extraction_strength": scores(0.25, 0.75),
        "mia_min_k": {"forget": scores(0.1, 0.2), "holdout": scores(0.15, 0.3)},
    }
    for name in ("retain", "ra", "wf"):
        source = "retain_Q_A_PARA_Prob" if name == "retain" else f"{name}_Q_A_Prob"
        log |= {
            source: losses(log2, log2),
            f"{name}_Q_A_PERT_Prob": losses([log4], [log4]),
            f"{name}_Q_A_ROUGE": copy.deepcopy(said),
            f"{name}_Truth_Ratio": {},
        }
    return log | {"retain_Q_A_Prob": losses(log2, log2)}


def test_by_hand():
    log = small_log()
    retain_log = small_log()
    retain_log["mia_min_k"] = {"forget": scores(0.1, 0.3), "holdout": scores(0.2, 0.2)}
    for one, seen in ((log, 0.0), (retain_log, 0.9)):  # against other models each
        one["mia_reference"] = {"forget": scores(seen, seen), "holdout": scores(0.5, 0.5)}
    found = aggregates(log, retain_log)
    assert found["forget_Q_A_Prob"] == pytest.approx(3 / 8)
    assert found["forget_truth_ratio"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["ra_Q_A_Prob_normalised"] == pytest.approx(2 / 3)
    assert found["ra_Truth_Ratio"] == pytest.approx(1 / 2)
    assert found["wf_Q_A_ROUGE"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["mia_min_k"] == pytest.approx(3 / 4)
    assert found["privleak"] == pytest.approx(100 * (1 / 4 - 1 / 2) / (1 / 2))
    assert found["privacy"] == pytest.approx(1 - (3 / 4 - 1 / 2) / (1 / 2))
    parts = [1 / 2, 2 / 3, 2 / 3, *[2 / 3] * 3, *[1 / 2] * 3]  # Prob, ROUGE, truth ratio
    assert found["model_utility"] == pytest.approx(9 / sum(1 / part for part in parts))
    remembered = [1 / 2, 1 / 4, 3 / 8, (1 / 2 + 1 / 3) / 2]
    assert found["memorization"] == pytest.approx(4 / sum(1 / (1 - part) for part in remembered))
    assert found["forget_quality"] == 1


def test_without_the_retain_log_privleak_warns_and_quality_is_left_out(caplog):
    with caplog.at_level(logging.WARNING):
        found = aggregates(small_log())
    assert "forget_quality" not in found
    assert found["privleak"] == pytest.approx(-50)
    assert rel_diff(found["mia_min_k"], 0.5) == pytest.approx(50)
    assert "give its log as retain_log" in caplog.text


def test_what_evaluate_found_becomes_a_log_of_theirs():
    rows = {
        "forget": [
            {
                "question": f"Who is {name}?", "answer": f"{name} of Oslo", "generated": name,
                "loss": loss, "paraphrased_loss": loss, "perturbed_loss": [1.0, 2.0],
                "answer_tokens": 4, "extraction_strength": strength, "exact_memorisation": 0.5,
                "min_k": -loss,
            }
            for name, loss, strength in (("Ann", 0.5, 0.0), ("Bob", 1.5, 0.75))
        ],
        "holdout": [{"answer": "Cy", "loss": 2.0, "min_k": -2.0}],
        "world_facts": [
            {"question": "What?", "answer": "Paris", "loss": 1.0, "perturbed_loss": [1.0]}
        ],
    }  # fmt: skip
    log = to_log(rows)
    assert json.loads(json.dumps(log)) == log
    items = {
        name: [*part["value_by_index"].values()]
        for name, part in log.items()
        if "value_by_index" in part
    }
    assert items["forget_Q_A_Prob"][1] == {"prob": pytest.approx(math.exp(-1.5)), "avg_loss": 1.5}
    assert items["forget_Q_A_PERT_Prob"][0]["prob"] == pytest.approx([math.exp(-1), math.exp(-2)])
    assert items["forget_truth_ratio"][0]["score"] == pytest.approx(math.exp(-1.5) / math.exp(-0.5))
    assert items["extraction_strength"] == [{"score": 0.25}, {"score": 0.75}]
    assert items["forget_Q_A_ROUGE"][0] == {
        "input": "Who is Ann?", "ground_truth": "Ann of Oslo", "generation": "Ann",
        "rouge1_recall": pytest.approx(1 / 3), "rougeL_f1": pytest.approx(1 / 2),
        "rougeL_recall": pytest.approx(1 / 3),
    }  # fmt: skip
    assert [i["score"] for i in log["mia_min_k"]["forget"]["value_by_index"].values()] == [0.5, 1.5]
    assert log["mia_loss"]["agg_value"] == 1  # holdout answers are less likely
    assert log["wf_Q_A_Prob_normalised"]["agg_value"] == pytest.approx(0.5)
    assert "model_utility" not in log
    shown = summary(log)
    assert shown.keys() >= {"forget_Q_A_Prob", "mia_zlib", "privleak", "memorization"}
    assert shown == pytest.approx(aggregates(log))
    again = to_log(rows, log)
    assert again["forget_quality"]["agg_value"] == 1
    assert "mia_reference" not in log
    reference = again["mia_reference"]["forget"]["value_by_index"].values()
    assert [item["score"] for item in reference] == [0, 0]
    assert not {"mia_gradnorm", "mia_min_k_plus_plus"} & log.keys()
    for row in (*rows["forget"], *rows["holdout"]):
        row |= {"gradnorm": 2 * row["loss"], "min_k_plus_plus": -3 * row["loss"]}
    log = to_log(rows)
    for name, factor in (("gradnorm", 2), ("min_k_plus_plus", 3)):
        found = log[f"mia_{name}"]["forget"]["value_by_index"].values()
        assert [item["score"] for item in found] == [factor * 0.5, factor * 1.5]
        assert log[f"mia_{name}"]["agg_value"] == 1


def asked(*questions):
    return items(
        *({"input": f"user\n\n{q}", "ground_truth": f"It is {q}.", "generation": q}
          for q in questions)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda log: log.update(forget_Q_A_ROUGE=asked("Why?", "Who?")), "of another forget set"),
        (lambda log: log.update(forget_Q_A_ROUGE=asked("Who?")), "another forget set: 1 questions"),
    ],
)
def test_a_retain_log_of_other_questions_is_named(change, message):
    log = small_log() | {"forget_Q_A_ROUGE": asked("Who?", "Why?")}
    assert aggregates(log, log)["forget_quality"] == 1
    other = copy.deepcopy(log)
    change(other)
    with pytest.raises(ValueError, match=message):
        aggregates(log, other)


def test_a_log_is_read_from_its_file_or_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*TOFU_EVAL\.json"):
        read_log(tmp_path)
    path = tmp_path / "TOFU_EVAL.json"
    path.write_text(json.dumps(small_log()))
    assert read_log(tmp_path) == read_log(path) == small_log()
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds no metric"):
        read_log(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda log: log.pop("ra_Q_A_PERT_Prob"), r"'ra_Q_A_PERT_Prob'.*must hold items"),
        (lambda log: log.update(exact_memorization={"value_by_index": []}), "must hold items"),
        (lambda log: log.update(exact_memorization=scores("x")), r"\['0'\] has no score"),
        (lambda log: log.update(extraction_strength=scores(math.nan)), "not finite"),
        (lambda log: log.update(mia_min_k=3), "no object of forget and holdout"),
        (lambda log: log.update(forget_Q_A_Prob=losses([])), r"\['0'\] has no finite avg_loss"),
        (lambda log: log.update(wf_Q_A_PERT_Prob=losses(["x"], [1.0])), "no finite avg_loss"),
        (lambda log: log.update(wf_Q_A_PERT_Prob=losses([1.0])), "of different questions"),
        (lambda log: log["ra_Q_A_ROUGE"]["value_by_index"]["1"].pop("generation"), "generation"),
        (lambda log: log["ra_Q_A_ROUGE"]["value_by_index"].pop("1"), "'1' is missing in one of"),
        (lambda log: log["forget_Q_A_Prob"]["value_by_index"].pop("0"), "'0' is missing in one of"),
        (
            lambda log: log["mia_min_k"]["forget"]["value_by_index"].pop("0"),
            r"'forget_Q_A_Prob'.*'mia_min_k'.* \(2 and 1 forget items\)",
        ),
    ],
)
def test_a_damaged_log_is_named(change, message):
    log = small_log()
    change(log)
    with pytest.raises(ValueError, match=message):
        aggregates(log)
