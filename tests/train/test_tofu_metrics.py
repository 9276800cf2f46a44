"""TOFU's scores: hand-computed logs, malformed logs, and the published logs of two real models."""

import copy
import json
import math
import pickle
import warnings

import numpy as np
import pytest

from nsru_train.metrics.tofu import (
    LOG_FILES,
    check_retain_log,
    forget_quality,
    load_log,
    model_utility,
    truth_ratio,
    truth_ratio_score,
)

LN2, LN4, LN8 = math.log(2), math.log(4), math.log(8)
PUBLISHED = {  # peers: geometric mean over the perturbed answers
    "llama2-7b_full.json": 0.622677,
    "llama2-7b_retain90.json": 0.613745,
}


def columns(right, paraphrased, wrong, rouge):
    return {
        "avg_gt_loss": right,
        "avg_paraphrased_loss": paraphrased,
        "average_perturb_loss": wrong,
        "rougeL_recall": rouge,
    }


@pytest.fixture
def log():
    """Two questions a split. Retain: p = 3/8, ROUGE 3/4, R = 1/2 and 2, so (1/2 + 0)/2 = 1/4."""
    return {
        LOG_FILES["retain"]: columns([LN2, LN4], [LN2, LN4], [[LN4, LN4], [LN2]], [1.0, 0.5]),
        # p: (1/2)/(1/2 + 1/4 + 1/4) and (1/4)/(1/4 + 1/4), each 1/2.
        LOG_FILES["world_facts"]: columns(
            [LN2, LN4], [LN2, LN2], [[LN4, LN4], [LN4]], [0.25, 0.75]
        ),
        LOG_FILES["forget"]: columns([LN2], [LN2], [[LN4, LN4]], [0.0]),
    }


def test_model_utility_by_hand(log):
    utility = model_utility(log)
    assert utility.splits == ("retain", "world_facts")
    assert utility.scores["retain"] == pytest.approx(
        {"probability": 3 / 8, "rougeL_recall": 3 / 4, "truth_ratio": 1 / 4}
    )
    assert utility.scores["world_facts"] == pytest.approx(
        {"probability": 1 / 2, "rougeL_recall": 1 / 2, "truth_ratio": 1 / 2}
    )
    assert utility == pytest.approx(6 / (8 / 3 + 4 / 3 + 4 + 2 + 2 + 2), rel=1e-12)
    assert model_utility(log, splits=["retain"]) == pytest.approx(3 / 8, rel=1e-12)


def test_model_utility_is_a_float_that_survives_copies(log):
    utility = model_utility(log)
    for other in (copy.deepcopy(utility), pickle.loads(pickle.dumps(utility))):
        assert (other, other.splits) == (utility, utility.splits)
    assert json.loads(json.dumps(utility)) == float(utility)


def test_one_zero_makes_the_harmonic_mean_zero(log):
    log[LOG_FILES["retain"]]["rougeL_recall"] = [0.0, 0.0]
    assert model_utility(log) == 0.0


def test_the_two_means_of_the_truth_ratio():
    # Wrong answers with p = 1 and 1/4: geometric mean 1/2, arithmetic 5/8; right answer p = 1/2.
    assert truth_ratio([LN2], [[0.0, LN4]]) == pytest.approx([1.0])
    assert truth_ratio([LN2], [[0.0, LN4]], "arithmetic") == pytest.approx([1.25])
    with pytest.raises(ValueError, match="'geometric' or 'arithmetic', got 'harmonic'"):
        truth_ratio([LN2], [[LN2]], "harmonic")


def test_truth_ratio_score_on_and_off_the_forget_set():
    ratio = np.array([0.5, 4.0, 0.0, np.inf])
    assert truth_ratio_score(ratio, forget=False) == pytest.approx((0.5 + 1) / 4)
    assert truth_ratio_score(ratio, forget=True) == pytest.approx((0.5 + 0.25) / 4)


def test_losses_of_a_collapsed_model_neither_overflow_nor_warn():
    huge = columns([2000.0], [2000.0], [[1.0, 1.0]], [0.5])
    log = {LOG_FILES["retain"]: huge, LOG_FILES["real_authors"]: huge, LOG_FILES["forget"]: huge}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model_utility(log) == 0.0
        assert forget_quality(log, log) == 1.0


def test_forget_quality_by_hand():
    def forget(ratios):
        n = len(ratios)
        return {
            LOG_FILES["forget"]: {
                "avg_paraphrased_loss": [LN8] * n,
                "average_perturb_loss": [[LN8 - math.log(r)] * 2 for r in ratios],
            }
        }

    apart = forget_quality(forget([0.1, 0.2, 0.3]), forget([4, 5, 6]))
    assert apart.statistic == 1.0
    assert apart == pytest.approx(2 / math.comb(6, 3))  # the two most extreme of the 20 orders
    assert forget_quality(forget([1, 2]), forget([1, 2])) == 1.0
    with pytest.raises(ValueError, match="log holds 2 forget questions, retain_log 3"):
        forget_quality(forget([1, 2]), forget([1, 2, 3]))
    with pytest.raises(ValueError, match="retain_log is missing; it needs"):
        forget_quality(forget([1, 2]), None)
    with pytest.raises(ValueError, match=r"retain_log has no 'eval_log_forget.json'.*found: other"):
        forget_quality(forget([1, 2]), {"other": {}})


def test_a_retain_log_that_lacks_what_is_compared_is_named(tmp_path):
    column = {"avg_paraphrased_loss": [LN2, LN2], "average_perturb_loss": [[LN2], [LN2]]}
    path, asked = tmp_path / "log.json", {"forget": [("Who?", "Ann."), ("Where?", "Here.")]}
    path.write_text(json.dumps({LOG_FILES["forget"]: column}))
    check_retain_log(path, asked, ratios=True)
    with pytest.raises(ValueError, match="of another forget set: 2 questions, not 1"):
        check_retain_log(path, {"forget": asked["forget"][:1]}, ratios=True)
    path.write_text(json.dumps({LOG_FILES["forget"]: {"avg_gt_loss": [LN2, LN2]}}))
    check_retain_log(path, asked, ratios=False)
    with pytest.raises(ValueError, match=r"\['avg_paraphrased_loss'\] is missing"):
        check_retain_log(path, asked, ratios=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("avg_gt_loss", [LN2, math.nan], r"\['avg_gt_loss'\]\[1\] is nan.*diverge"),
        ("avg_gt_loss", [math.inf, LN2], r"\['avg_gt_loss'\]\[0\] is inf"),
        ("avg_gt_loss", [LN2, -0.1], r"\['avg_gt_loss'\]\[1\] is -0.1"),
        ("avg_gt_loss", [LN2], "different lengths: avg_gt_loss 1, avg_paraphrased_loss 2"),
        ("avg_gt_loss", [], "non-empty list"),
        ("avg_gt_loss", 0.5, "non-empty list"),
        ("avg_gt_loss", ["a", "b"], "non-empty list"),
        ("avg_gt_loss", [[LN2], [LN2]], "non-empty list"),
        ("average_perturb_loss", [[LN2], []], r"\['average_perturb_loss'\]\[1\] must be"),
        ("average_perturb_loss", [[LN2], [math.nan]], r"\['average_perturb_loss'\]\[1\]\[0\] is"),
        ("average_perturb_loss", [LN2, LN2], "non-empty list"),
        ("rougeL_recall", [0.5, 1.5], r"is 1.5, must be in \[0, 1\]"),
        ("avg_paraphrased_loss", None, r"\['avg_paraphrased_loss'\] is missing; found: avg_gt"),
    ],
)
def test_malformed_columns(log, key, value, message):
    if value is None:
        del log[LOG_FILES["retain"]][key]
    else:
        log[LOG_FILES["retain"]][key] = value
    with pytest.raises(ValueError, match=message):
        model_utility(log)


def test_missing_and_unknown_splits(log):
    with pytest.raises(ValueError, match=r"has no 'eval_real_author_wo_options\.json'"):
        model_utility(log, splits=["retain", "real_authors"])
    for splits in (["forget"], []):
        with pytest.raises(ValueError, match="splits must be out of retain, real_authors"):
            model_utility(log, splits=splits)
    with pytest.raises(ValueError, match=r"holds none of eval_log.json.*found: eval_log_forget"):
        model_utility({LOG_FILES["forget"]: log[LOG_FILES["forget"]]})
    with pytest.raises(ValueError, match="must be an object of columns"):
        model_utility({LOG_FILES["retain"]: [1.0]})


def test_load_log(tmp_path, log):
    path = tmp_path / "log.json"
    for content in (log, {"schema": 1, "kind": "eval", "log": log}):
        path.write_text(json.dumps(content))
        assert model_utility(load_log(path)) == model_utility(log)
    for text, message in (("{", "not valid JSON"), ("[]", "holds none of"), ("{}", "holds none")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_log(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_log(tmp_path / "absent.json")


@pytest.mark.parametrize(("name", "expected"), PUBLISHED.items())
def test_published_model_utility(shared_data, name, expected):
    utility = model_utility(load_log(shared_data / "tofu_logs" / name))
    assert utility.splits == ("retain", "real_authors", "world_facts")
    assert utility == pytest.approx(expected, abs=1e-6)


def test_published_forget_quality(shared_data):
    full, retain = (load_log(shared_data / "tofu_logs" / name) for name in PUBLISHED)
    quality = forget_quality(full, retain)
    # abs=0: approx's default of 1e-12 would accept anything this small.
    assert quality == pytest.approx(1.834066e-21, rel=1e-6, abs=0)
    assert quality.statistic == pytest.approx(0.396667, abs=1e-6)
    # The legacy mean gives other numbers: the two must not be mixed up.
    assert forget_quality(full, retain, "arithmetic") != pytest.approx(1.834066e-21, rel=0.1, abs=0)
    assert model_utility(full, "arithmetic") != pytest.approx(0.622677, abs=1e-2)
