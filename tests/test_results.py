"""The committed results say what the documents say they do."""

import csv
import json
import re
from pathlib import Path
from statistics import fmean

import pytest

from nsru_train.demo.run import goals
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


def ratios(name, column):
    with (RESULTS / name).open(newline="") as file:
        return {row["provider"]: float(row[column]) for row in csv.DictReader(file)}


def quoted(heading):
    """The numbers with two decimals in the table below a heading of docs/performance.md."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [float(number) for row in rows for number in re.findall(r"\b\d+\.\d\d\b", row)]


@pytest.mark.parametrize(
    ("heading", "files"),
    [
        ("One projected linear, forward and backward", ["linear_cpu.csv", "linear_cpu_amd.csv"]),
        ("Siblings", ["siblings_cpu.csv"]),
    ],
)
def test_performance_document_quotes_the_csv(heading, files):
    measured = [
        round(ratio, 2)
        for name in files
        for provider, ratio in ratios(name, "ratio_to_frozen").items()
        if provider != "frozen"
    ]
    assert sorted(quoted(heading)) == pytest.approx(sorted(measured), abs=0.0051)


def test_performance_document_quotes_the_steps():
    with (RESULTS / "cpu" / "step.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["provider"] != "frozen"]
    measured = sorted(float(row["ratio"]) for row in rows)
    assert sorted(quoted("A whole step")) == pytest.approx(measured, abs=0.0051)
