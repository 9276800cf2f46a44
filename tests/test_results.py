"""The committed results say what the documents say they do."""

import csv
import json
import re
from pathlib import Path
from statistics import fmean

import pytest

from nsru_train.demo import goals
from nsru_train.report.summary import matched_damage

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def tofu():
    return json.loads((RESULTS / "tofu-cpu" / "results.json").read_text())


def test_tofu_reaches_the_goals(tofu):
    assert [reached for *_, reached in goals(tofu["methods"])] == [True, True, True]


def test_tofu_does_at_most_a_third_of_the_damage(tofu):
    matched = matched_damage(tofu)
    assert matched == tofu["matched"]
    assert len(matched) >= 3
    assert fmean(row["ratio"] for row in matched) <= 1 / 3
    last = {(row["method"], row["seed"]): row["forget_prob"] for row in tofu["methods"]}
    for seed in range(3):
        assert last["nsru", seed] <= last["lora", seed]


def test_tofu_texts_are_not_in_the_results(tofu):
    assert tofu["examples"] == []


def test_performance_document_quotes_the_csv():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    with (RESULTS / "linear_cpu.csv").open(newline="") as file:
        ratios = {row["provider"]: float(row["ratio_to_frozen"]) for row in csv.DictReader(file)}
    quoted = {float(number) for number in re.findall(r"\| \**(\d\.\d\d)\** \|", text)}
    assert quoted == {round(ratio, 2) for name, ratio in ratios.items() if name != "frozen"}
