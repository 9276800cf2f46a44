"""OpenUnlearning's numbers: from two of its published logs, and by hand."""

import copy
import gzip
import json
import logging
import math

import numpy as np
import pytest

from nsru_train.metrics.open_unlearning import (
    aggregates,
    rouge_recalls,
    summary,
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
    assert found == {"memorization": pytest.approx(0.0868, abs=5e-5)}


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
    found = aggregates(log, retain_log)
    assert found["forget_Q_A_Prob"] == pytest.approx(3 / 8)
    assert found["forget_truth_ratio"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["ra_Q_A_Prob_normalised"] == pytest.approx(2 / 3)
    assert found["ra_Truth_Ratio"] == pytest.approx(1 / 2)
    assert found["wf_Q_A_ROUGE"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["mia_min_k"] == pytest.approx(3 / 4)
    assert found["privleak"] == pytest.approx(100 * (1 / 4 - 1 / 2) / (1 / 2))
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
    assert to_log(rows, log)["forget_quality"]["agg_value"] == 1


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
    ],
)
def test_a_damaged_log_is_named(change, message):
    log = small_log()
    change(log)
    with pytest.raises(ValueError, match=message):
        aggregates(log)
