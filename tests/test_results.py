"""The committed results say what the documents say they do."""

import json
import re
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest

from nsru_bench import plots
from nsru_bench.cases import PUBLISHED
from nsru_bench.rows import read
from nsru_bench.winners import plan_table
from nsru_train.demo.run import goals
from nsru_train.report.summary import matched_damage

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def test_unlearning_document_quotes_the_separations():
    found = {
        (r["model"], float(r["floor"])): r for r in read(RESULTS / "editability/separation.csv")
    }
    text = (ROOT / "docs" / "unlearning.md").read_text(encoding="utf-8")
    for model, name in (
        ("smollm2", "SmolLM2-135M"), ("fictitious", "1.0M parameters"), ("tofu", "5.8M parameters"),
    ):  # fmt: skip
        values = [f"{float(found[model, f]['median']):.1f}" for f in (0.05, 0.4, 0.2, 0.1, 0.02)]
        assert re.search(rf"\| {name}, [^|]* \| {values[0]} \| {', '.join(values[1:])} \|", text)


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


def test_the_present_defaults_do_what_their_page_says():
    folder = RESULTS / "tofu-cpu-defaults"
    results = json.loads((folder / "results.json").read_text())
    assert results["examples"] == []
    assert [reached for *_, reached in goals(results["methods"])] == [True, True, True]
    matched = matched_damage(results)
    assert matched == results["matched"]
    page = (folder / "README.md").read_text(encoding="utf-8")
    for method in ("nsru", "lora"):
        damage = [row[f"{method}_damage"] for row in matched]
        assert f"{fmean(damage):.4f} ({min(damage):.4f} to {max(damage):.4f})" in page
    assert "0.40, 0.52 and 0.46" in page
    assert [round(row["ratio"], 2) for row in matched] == [0.40, 0.52, 0.46]


def test_tofu_texts_are_not_in_the_results(tofu):
    assert tofu["examples"] == []


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
        round(float(row["ratio_to_frozen"]), 2)
        for name in files
        for row in read(RESULTS / name)
        if row["provider"] != "frozen"
    ]
    assert sorted(quoted(heading)) == pytest.approx(sorted(measured), abs=0.0051)


@pytest.mark.parametrize(
    ("heading", "name"),
    [("A whole step", "step.csv"), ("Per-token NLL without logits", "loss.csv")],
)
def test_performance_document_quotes_the_ratios(heading, name):
    rows = [row for row in read(RESULTS / "cpu" / name) if row["provider"] != row["base"]]
    measured = sorted(float(row["ratio"]) for row in rows)
    assert sorted(quoted(heading)) == pytest.approx(measured, abs=0.0051)


def test_performance_document_quotes_the_gpu():
    rows = read(RESULTS / "nvidia-h200" / "linear.csv")
    measured = [
        plots.best_ratios(rows, which, *shape)[way]
        for way in plots.WAYS
        for shape in PUBLISHED
        for which in ("forward", "forward+backward")
    ]
    assert quoted("On an H200") == pytest.approx(measured, abs=0.0051)
    forward = [plots.best_ratios(rows, "forward", *shape)["CUDA kernels"] for shape in PUBLISHED]
    assert all(ratio <= aim for ratio, aim in zip(forward, (1.05, 1.02, 1.03), strict=True))


def test_the_plan_table_of_a_gpu_is_made_of_its_committed_rows():
    table = json.loads((ROOT / "nsru_kernels" / "plans" / "nvidia-h200.json").read_text())
    assert plan_table(RESULTS / "nvidia-h200") == table


def test_unlearning_document_quotes_the_sweep_of_floors():
    text = (ROOT / "docs" / "unlearning.md").read_text(encoding="utf-8")
    shown = {
        name: [float(cell.strip(" %")) for cell in cells.split("|") if cell.strip()]
        for name, cells in re.findall(r"^\| (\d+%|LoRA, no projection) \|(.*)$", text, re.MULTILINE)
    }
    rows = {}
    for row in read(RESULTS / "editability" / "fictitious.csv"):
        floor = row["min_editability"]
        name = f"{float(floor):.0%}" if floor else "LoRA, no projection"
        rows.setdefault(name, []).append(row)
    assert shown.keys() == rows.keys()
    names = ("retain_unseen_lost", "retain_untouched_lost", "last_forget_prob", "last_safe_prob")
    for name, runs in rows.items():
        means = [fmean(float(run[column]) for run in runs) for column in names]
        assert shown[name][-4:] == list(map(round, means, (4, 4, 3, 2))), name


def test_performance_document_quotes_the_accuracy_of_the_sketch():
    rows = read(RESULTS / "cpu" / "sketch_accuracy.csv")
    found = {(row["spectrum"], row["provider"], row["L"]): row for row in rows}
    ours, fixed = (
        [float(found["1/i", name, width]["ratio"]) for width in ("40", "64")]
        for name in ("RetainSketch", "RetainSketch, no refresh")
    )
    pca = found["1/i and a mean", "peft IncrementalPCA", "64"]
    text = " ".join((ROOT / "docs" / "performance.md").read_text(encoding="utf-8").split())
    assert f"{ours[0]:.3f} at L = 40, {ours[1]:.3f} at L = 64; without refreshes" in text
    assert "without refreshes {:.2f} and {:.2f}.".format(*fixed) in text
    assert f"leave {float(pca['ratio']):.2f} times the optimum and" in text
    assert f"claim {100 * float(pca['claim_error']):.0f} points too much" in text
    certified = [float(row["claim_error"]) for row in rows if row["certified"] == "True"]
    assert max(certified) <= 1e-6, "never claimed too much"


@pytest.fixture(scope="module")
def smollm2():
    return json.loads((RESULTS / "smollm2" / "results.json").read_text())


def test_smollm2_does_at_most_a_fifth_of_the_damage(smollm2):
    assert smollm2["matched"] == matched_damage(smollm2)
    assert [row["seed"] for row in smollm2["matched"]] == [0, 1, 2]
    assert all(row["ratio"] <= 1 / 5 for row in smollm2["matched"])
    assert all(row["nsru_step"] <= 1.5 * row["lora_step"] for row in smollm2["matched"])
    for row in smollm2["methods"]:
        if row["method"] == "nsru":
            assert row["forget_prob"] <= 0.1
            assert row["safe_prob"] >= 0.9


def test_the_readme_quotes_smollm2(smollm2):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    ours, theirs = (
        [row[f"{method}_damage"] for row in smollm2["matched"]] for method in ("nsru", "lora")
    )
    assert f"by {min(ours):.3f} to {max(ours):.3f} with NSRU" in page
    assert f"by {min(theirs):.2f} to {max(theirs):.2f} with the same LoRA" in page


def test_unlearning_document_quotes_what_sets_the_scale():
    page = (ROOT / "docs" / "unlearning.md").read_text(encoding="utf-8")
    energy, rules, steps = (
        read(RESULTS / "smollm2" / f"scale_{name}.csv") for name in ("energy", "rules", "steps")
    )
    changes = {(row["rule"], float(row["floor"]), float(row["power"])): row for row in steps}
    assert f"{float(changes['none', 1.0, 0.0]['forget_change']):.4f} (rms) with LoRA" in page
    for power in (0.0, 0.5, 1.0):
        found = [
            float(changes["unit answers", f, power]["forget_change"]) for f in (0.02, 0.05, 0.2)
        ]
        assert "{:.4f}, {:.4f} and {:.4f}".format(*found) in page
    kept = float(changes["unit answers", 0.05, 0.5]["kept_change"])
    assert f"to keep moved by {kept:.4f} in that step" in page
    assert f"with LoRA by {float(changes['none', 1.0, 0.0]['kept_change']):.4f}" in page
    shared = Counter()
    for row in energy:
        shared[row["input"]] += float(row["energy"]) * (row["kind"] in ("first", "template"))
    *others, second, first = sorted(shared.values())
    assert f"{first:.2%}".replace("%", " %") in page
    assert f"{second:.1%} at".replace("%", " %") in page
    assert f"{min(others):.0%}"[:-1] + f" to {max(others):.0%}".replace("%", " %") in page
    for rule, floor, text in (
        ("unit answers", 0.05, "then {:.1f} times"),
        ("all energy", 0.05, "{:.1f} times when energy"),
        ("unit answers", 0.02, "more ({:.1f} at 2 %)"),
        ("unit answers", 0.2, "less ({:.1f} at 20 %;"),
    ):
        chosen = [r for r in rules if r["rule"] == rule and float(r["floor"]) == floor]
        forget, retain = (sum(float(r[f"{n}_open"]) for r in chosen) for n in ("forget", "retain"))
        assert text.format(forget / retain) in page


def test_unlearning_document_quotes_the_rates_on_smollm2(smollm2):
    text = (ROOT / "docs" / "unlearning.md").read_text(encoding="utf-8")
    section = text.split("## On a pretrained model\n")[1].split("\n## ")[0]
    rows = [re.sub("[*]", "", line).split("|")[1:-1] for line in section.splitlines()]
    shown = {
        (row[0].split()[0].lower(), float(row[1])): row[2:]
        for row in rows
        if len(row) > 5 and "e-" in row[1]
    }
    before = smollm2["methods"][0]["retain_unseen_prob"]
    runs = {}
    for point in smollm2["tuning"]:
        runs.setdefault((point["method"], point["lr"]), []).append(point)
    assert shown.keys() == runs.keys()
    for run, points in runs.items():
        reached = next((point for point in points if point["forget_prob"] <= 0.1), None)
        wanted = [None] * 3
        if reached is not None:
            lost = before - reached["retain_unseen_prob"]
            wanted = [reached["step"], round(reached["forget_prob"], 3), round(lost, 3)]
        last = points[-1]
        wanted += [last["step"], round(last["forget_prob"], 3), round(last["safe_prob"], 2)]
        wanted += [abs(round(before - last["retain_unseen_prob"], 3))]
        cells = [cell.strip() for cell in shown[run]]
        assert [float(c) if c and c != "never" else None for c in cells] == wanted, run


def test_the_defaults_forget_on_smollm2(smollm2):
    found = json.loads((RESULTS / "smollm2" / "defaults.json").read_text())
    before, last = smollm2["methods"][0], found["frontier"][-1]
    first = next(point for point in found["frontier"] if point["forget_prob"] <= 0.1)
    assert {point["lr"] for point in found["frontier"]} == {5e-4}
    lost = [before["retain_unseen_prob"] - point["retain_unseen_prob"] for point in (first, last)]
    general = [before[name] - value for name, value in found["general"].items()]
    text = (ROOT / "docs" / "unlearning.md").read_text(encoding="utf-8")
    for said in (
        f"P forget {first['forget_prob']:.3f} after {first['step']} steps, for {lost[0]:.4f} on",
        f"at step {last['step']} with P safe {last['safe_prob']:.2f}, P forget "
        f"{last['forget_prob']:.3f} and\n{lost[1]:.4f} lost",
        "General knowledge lost {:.3f} and {:.3f}".format(*general),
    ):
        assert said in text, said


def test_unlearning_document_quotes_the_floors_on_smollm2(smollm2):
    floors = json.loads((RESULTS / "smollm2" / "floors.json").read_text())
    text = (ROOT / "docs" / "unlearning.md").read_text(encoding="utf-8")
    before = smollm2["methods"][0]
    for row in floors:
        first = next(point for point in row["frontier"] if point["forget_prob"] <= 0.1)
        last = row["frontier"][-1]
        lost = [
            before["retain_unseen_prob"] - point["retain_unseen_prob"] for point in (first, last)
        ]
        cells = [
            f"{row['min_editability']:.0%}".replace("%", " %"), f"{row['mean_rank']:.0f}",
            f"{row['mean_captured_energy']:.1%}".replace("%", " %"), f"{first['step']}",
            f"{first['forget_prob']:.3f}", f"{lost[0]:.4f}", f"{last['step']}",
            f"{last['safe_prob']:.2f}", f"{lost[1]:.4f}",
            *(f"{before[name] - value:.3f}" for name, value in row["general"].items()),
        ]  # fmt: skip
        assert f"| {' | '.join(cells)} |" in text


def test_unlearning_document_quotes_the_seeds_on_smollm2(smollm2):
    text = (ROOT / "docs" / "unlearning.md").read_text(encoding="utf-8")
    before, *runs = smollm2["methods"]
    shown = re.findall(r"^\| (NSRU|LoRA) .*?\| (\d) \| (\d+ \|.*) \|$", text, re.MULTILINE)
    assert len(shown) == len(runs)
    table = {(name.lower(), int(seed)): cells for name, seed, cells in shown}
    for row in runs:
        lost = before["retain_unseen_prob"] - row["retain_unseen_prob"]
        cells = [
            f"{row['step']}", f"{row['forget_prob']:.3f}", f"{row['safe_prob']:.2f}",
            f"{lost:.3f}", f"{row['forget_safe_rougeL_recall']:.2f}",
            f"{row['real_authors_exact_memorisation']:.3f}",
            f"{row['world_facts_exact_memorisation']:.3f}",
        ]  # fmt: skip
        assert table[row["method"], row["seed"]].split(" | ") == cells
    for quoted, kind in (
        ("NSRU lost {:.3f} on `real_authors` and {:.3f} on `world_facts`", "nsru"),
        ("LoRA {:.3f} and {:.3f}. The aim", "lora"),
    ):
        keys = [f"{group}_exact_memorisation" for group in ("real_authors", "world_facts")]
        own = [row for row in runs if row["method"] == kind]
        lost = [before[key] - fmean(row[key] for row in own) for key in keys]
        assert quoted.format(*lost) in text


def test_unlearning_document_quotes_what_the_null_space_does_for_other_methods():
    results = json.loads((RESULTS / "frontier-fictitious" / "results.json").read_text())
    matched = matched_damage(results)
    assert matched == results["matched"]
    rates = {}
    for point in results["tuning"]:
        rates.setdefault(point["method"], set()).add(point["lr"])
    assert len(rates) == 37
    assert rates.pop("eco") == {0}
    assert set(map(frozenset, rates.values())) == {frozenset((3e-4, 1e-3, 3e-3))}
    text = (ROOT / "docs" / "unlearning.md").read_text(encoding="utf-8")
    section = text.split("## Other methods, with and without the null space\n")[1].split("\n## ")[0]
    shown = [row.split("|")[1:-1] for row in section.splitlines() if row.startswith("| ")][1:]
    assert len(shown) == 13
    means = {}
    for name, *cells in ([cell.strip() for cell in row] for row in shown):
        pair = ("lora", "nsru") if name == "NSRU" else (name, f"{name} projected")
        lost = [fmean(row[f"{method}_damage"] for row in matched) for method in pair]
        safe = [
            fmean(row["safe_prob"] for row in results["methods"] if row["method"] == method)
            for method in pair
        ]
        wanted = (f"{lost[0]:.4f}", f"{lost[1]:.4f}", f"{lost[1] / lost[0]:.2f}")
        assert tuple(cells) == (*wanted, *(f"{value:.2f}" for value in safe)), name
        means[name] = lost
    assert f"NSRU's loss is {means['NSRU'][1] / means['alter'][0]:.2f}" in section
    plain = {name: lost[0] for name, lost in means.items() if name != "alter"}
    assert f"{means['NSRU'][1] / min(plain.values()):.2f} of the best method" in section
    names = ["lora" if name == "NSRU" else name for name in plain]
    ratios = [
        f"{row['nsru_damage'] / min(row[f'{name}_damage'] for name in names):.2f}"
        for row in matched
    ]
    assert f"it is {', '.join(ratios[:-1])} and {ratios[-1]}" in section
    ends = {
        name: sorted(row["forget_prob"] for row in results["methods"] if row["method"] == name)
        for name in ("eco", "lune projected", "rmu", "rmu projected")
    }
    for name, (least, *_, most) in ends.items():
        assert f"{least:.2f} to {most:.2f}" in " ".join(section.split()), name


def test_lune_on_the_pretrained_model_is_what_its_section_says():
    rows = json.loads((RESULTS / "frontier-smollm2" / "lune.json").read_text())["methods"]
    before, plain, projected = rows
    results = json.loads((RESULTS / "frontier-smollm2" / "results.json").read_text())
    assert before == results["methods"][0]
    assert (plain["kept_step"], plain["forget_prob"]) == (0, before["forget_prob"])
    text = (ROOT / "docs" / "unlearning.md").read_text(encoding="utf-8")
    assert f"in the null space leaves {projected['forget_prob']:.3f}" in text
    assert (
        f"answers still have {projected['forget_rougeL_recall']:.2f} of the right ones' words"
        in text
    )


def test_the_frontier_on_tofu_is_what_its_section_says():
    results = json.loads((RESULTS / "frontier-tofu-5.9m" / "results.json").read_text())
    matched = matched_damage(results)
    assert matched == results["matched"]
    assert [row["seed"] for row in matched] == [0, 1, 2]
    text = (ROOT / "docs" / "unlearning.md").read_text(encoding="utf-8")
    section = text.split("## Other methods where forget and retain hardly separate\n")[1]
    section = section.split("\n## ")[0]
    assert f"(forget_prob ≤ {matched[0]['forget_prob']:.3f})" in section
    rates = {(point["method"], point["lr"]) for point in results["tuning"]}
    assert len(rates) == 38 * 3 + 1

    def end(method, key):
        return fmean(row[key] for row in results["methods"] if row["method"] == method)

    shown = [row.split("|")[1:-1] for row in section.splitlines() if row.startswith("| ")][1:]
    assert len(shown) == 12
    for name, *cells in ([cell.strip() for cell in row] for row in shown):
        pair = ("lora", "nsru") if name == "NSRU" else (name, f"{name} projected")
        plain, inside = (fmean(row[f"{method}_damage"] for row in matched) for method in pair)
        safe = [f"{end(method, 'safe_prob'):.2f}" for method in pair]
        assert cells == [f"{plain:.4f}", f"{inside:.4f}", f"{inside / plain:.2f}", *safe], name
    ratios = [f"{row['ratio']:.2f}" for row in matched]
    assert f"It costs {ratios[0]}, {ratios[1]} and {ratios[2]} times" in section
    rest = [
        f"{row['nsru_damage'] / min(row['dpo_damage'], row['npo_damage']):.2f}" for row in matched
    ]
    assert f"DPO and NPO, {rest[0]}, {rest[1]} and {rest[2]} times" in " ".join(section.split())
    for name in ("alter", "alter projected"):
        lost = [row[f"{name}_damage"] for row in matched]
        assert f"{min(lost):.4f} to {max(lost):.4f}" in section
    for name in ("altpo", "altpo projected", "lune", "lune projected"):
        left = [row["forget_prob"] for row in results["methods"] if row["method"] == name]
        assert f"{min(left):.2f} to {max(left):.2f}" in section
    of_lora = [f"{row['nsru_damage'] / row['lora_damage']:.2f}" for row in matched]
    assert f"({of_lora[1]} and {of_lora[2]} of it)" in section
    ends = [f"{end(m, 'forget_prob'):.3f}" for m in ("nsru", "npo projected", "dpo projected")]
    assert f"({ends[0]} at the end; {ends[1]} and {ends[2]})" in section
    before = results["methods"][0]["retain_unseen_prob"]
    at = {
        (point["method"], point["lr"], point["step"]): before - point["retain_unseen_prob"]
        for point in results["tuning"]
    }
    quoted = [at[point] for point in (
        ("nsru", 1e-3, 30), ("lora", 1e-3, 30), ("lora", 3e-3, 10), ("lora", 3e-3, 80),
    )]  # fmt: skip
    assert [round(value, 3) for value in quoted] == [0.022, 0.138, 0.342, 0.018]
    variants = json.loads((RESULTS / "frontier-tofu-5.9m" / "variants.json").read_text())
    real = RESULTS / "frontier-smollm2"
    points = json.loads((real / "gentler.json").read_text())["tuning"]
    start = points[0]["retain_unseen_prob"]
    slow = [p for p in points if p["lr"] == 1e-3][-1]["forget_prob"]
    lost = min(start - p["retain_unseen_prob"] for p in points if p["forget_prob"] <= 0.1)
    assert f"it left {slow:.3f} after 40 steps, and at 3e-3 it had lost {lost:.4f} when" in section
    default = matched_damage(json.loads((real / "results.json").read_text()))[0]["nsru_damage"]
    assert f"the default lost {default:.4f}" in section
    stopped = [row["forget_prob"] for row in variants.pop("nsru with suppression npo")["methods"]]
    assert f"NSRU ended at {min(stopped):.2f} to {max(stopped):.2f}" in section
    gentle = variants["nsru with w_suppress 0.25"]
    for variant in variants.values():
        for name in variant["setup"]["methods"]:
            lost = [
                before - max(
                    point["retain_unseen_prob"] for point in variant["frontier"]
                    if (point["method"], point["seed"]) == (name, seed)
                    and point["forget_prob"] <= matched[0]["forget_prob"]
                )
                for seed in range(3)
            ]  # fmt: skip
            if variant is gentle:
                by_seed = "{:.4f}, {:.4f} and {:.4f}".format(*lost)
                assert f"NSRU lost {by_seed} by seed" in section
                of_dpo = fmean(lost) / fmean(row["dpo_damage"] for row in matched)
                assert f"{of_dpo:.2f} of what DPO does" in section
                continue
            assert f"{fmean(lost):.4f}" in section


def test_what_wins_where_quotes_the_three_comparisons():
    folders = [RESULTS / f"frontier-{name}" for name in ("fictitious", "tofu-5.9m", "smollm2")]
    toy, tofu, real = (json.loads((f / "results.json").read_text()) for f in folders)
    text = (ROOT / "docs" / "unlearning.md").read_text(encoding="utf-8")
    section = text.split("## What wins where\n")[1].split("\n## ")[0]

    def safe(results, *methods):
        rows = [row for row in results["methods"] if row["method"] in methods]
        return [fmean(r["safe_prob"] for r in rows if r["method"] == name) for name in methods]

    own = [value for results in (toy, tofu, real) for value in safe(results, "nsru")]
    dpo = [value for results in (toy, tofu) for value in safe(results, "dpo", "dpo projected")]
    assert f"Safe answers end at {min(own):.2f} to {max(own):.2f} with NSRU" in section
    assert f"at {min(dpo):.2f} to {max(dpo):.2f} with DPO" in section
    ratios = [row["ratio"] for row in tofu["matched"]]
    assert f"{min(ratios):.0f} to {max(ratios):.0f} times the best of each seed" in section

    def lost(results, *names):
        matched = matched_damage(results)
        return min(fmean(row[f"{name}_damage"] for row in matched) for name in names)

    by_mean = lost(tofu, "nsru") / lost(tofu, "alter", "dpo", "npo")
    assert f"costs {by_mean:.2f} times" in section
    of_lora = lost(real, "nsru") / lost(real, "lora", "npo", "graddiff")
    assert f"on SmolLM2-135M {of_lora:.2f} of the best unprojected one" in section
    assert f"on the toy {lost(toy, 'nsru') / lost(toy, 'npo', 'wga'):.2f} of it" in section
    assert "twice what NPO costs in the null space" in section
    assert 1.9 < lost(tofu, "nsru") / lost(tofu, "npo projected") < 2.2


REPAIRED = {
    "NSRU": "nsru",
    "LoRA without projection": "lora",
    "graddiff in the null space": "graddiff-projected",
    "graddiff": "graddiff",
}


def test_the_table_of_repairs_quotes_the_runs():
    text = (ROOT / "docs" / "unlearning.md").read_text(encoding="utf-8")
    section = text.split("## What was lost, brought back\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    quoted = {name: cells for name, *cells in lines if name in REPAIRED}
    for name, file in REPAIRED.items():
        rows = {}
        for kind in ("rollback", "refresh"):
            saved = (RESULTS / "repair-fictitious" / f"{file}-{kind}.json").read_text()
            rows |= {row["method"]: row for row in json.loads(saved)["methods"]}
        shown = ("unlearned", "refreshed", "continued", "rolled back 0.005", "random 0.005")
        assert quoted.pop(name) == [
            f"{rows[one]['forget_prob']:.3f}, {rows[one]['retain_unseen_prob']:.3f}"
            for one in shown
        ]
    assert not quoted


def test_the_evaluation_is_twice_as_fast_as_open_unlearning():
    times = {row["provider"]: row for row in read(RESULTS / "evaluation_cpu.csv")}
    theirs, ours = times["open-unlearning"], times["nsru"]
    for name in ("model", "questions", "rounds", "device", "threads"):
        assert theirs[name] == ours[name]
    for seconds in ("seconds", "process_seconds"):
        assert float(theirs[seconds]) >= 2 * float(ours[seconds])


def test_the_step_of_smollm2_in_bf16_is_what_its_table_says():
    rows = read(RESULTS / "step_smollm2_bf16_cpu.csv")
    ratios = {(row["provider"], row["layers"]): float(row["ratio"]) for row in rows}
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for line, provider in (
        ("NSRU", "nsru"),
        ("PEFT, bf16 adapters (no projection)", "peft bf16"),
        ("PEFT and eager activation projection", "peft + eager projection"),
        ("full fine-tuning with a copied reference model", "full fine-tuning + reference model"),
    ):
        whole, part = (ratios[provider, layers] for layers in ("30", "6"))
        assert f"| {line} | {whole:.3f} × | {part:.3f} × |" in page
    assert f"{ratios['nsru', '30'] / ratios['peft bf16', '30']:.2f} of it" in page


def test_the_frontier_on_smollm2_is_what_its_section_says():
    folder = RESULTS / "frontier-smollm2"
    results = json.loads((folder / "results.json").read_text())
    matched = matched_damage(results)
    assert matched == results["matched"]
    [row] = matched
    text = (ROOT / "docs" / "unlearning.md").read_text(encoding="utf-8")
    section = text.split("## Other methods on a pretrained model\n")[1]
    section = section.split("\n## ")[0]
    assert f"(forget_prob ≤ {row['forget_prob']:.3f})" in section
    tables: list[list[list[str]]] = []
    for line in section.splitlines():
        if line.startswith("| | "):
            tables.append([])
        elif line.startswith("| "):
            tables[-1].append([cell.strip() for cell in line.split("|")[1:-1]])
    table, others = tables
    known = {one["method"]: one for one in results["methods"]}
    start = known["before"]["retain_unseen_prob"]
    for name, *cells in others:
        pair = [known[name], known[f"{name} projected"]]
        ends = [(one["forget_prob"], start - one["retain_unseen_prob"]) for one in pair]
        assert cells == [f"{v:.{3 + i}f}" for end in ends for i, v in enumerate(end)], name
    assert len(others) == 6
    safe = {one["method"]: one["safe_prob"] for one in results["methods"]}
    for name, *cells in table:
        pair = ("lora", "nsru") if name == "NSRU" else (name, f"{name} projected")
        plain, confined = (row[f"{method}_damage"] for method in pair)
        wanted = [f"{plain:.4f}", f"{confined:.4f}", f"{confined / plain:.2f}"]
        assert cells == [*wanted, *(f"{safe[method]:.2f}" for method in pair)], name
    assert len(table) == 3
    assert f"NSRU costs {row['ratio']:.2f} of what the best update" in section
    knowledge = {"nsru": (8, 12), "lora": (45, 34), "npo projected": (10, 1)}
    knowledge |= {"simnpo projected": (9, 12), "lune projected": (34, 31)}
    for method, lost in knowledge.items():
        for group, thousandths in zip(("real_authors", "world_facts"), lost, strict=True):
            key = f"{group}_exact_memorisation"
            assert round(1000 * (known["before"][key] - known[method][key])) == thousandths
    before = results["methods"][0]["retain_unseen_prob"]
    points = [*results["tuning"], *json.loads((folder / "rates.json").read_text())]
    least = {
        method: [
            min(
                (
                    before - point["retain_unseen_prob"]
                    for point in points
                    if (point["method"], point["lr"]) == (method, lr)
                    and point["forget_prob"] <= 0.1
                ),
                default=None,
            )
            for lr in (1e-3, 3e-3, 6e-3)
        ]
        for method in ("nsru", "lora")
    }
    assert [round(lost, 3) for lost in least["nsru"]] == [0.002, 0.010, 0.012]
    assert least["lora"][0] is None
    assert [round(lost, 3) for lost in least["lora"][1:]] == [0.095, 0.102]
    at = {(point["method"], point["lr"], point["step"]): point for point in points}
    assert round(at["simnpo", 3e-3, 20]["retain_prob"], 3) == 0.968
    assert round(at["simnpo projected", 3e-3, 20]["forget_prob"], 2) == 0.25


def test_host_time_on_a_cpu_is_what_its_section_says():
    rows = read(RESULTS / "host_time_cpu.csv")
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    section = text.split("## Few tokens on a CPU\n")[1].split("\n## ")[0]
    names = {"frozen": "frozen", "one by one": "nsru alone", "as a group": "nsru group"}
    for line, provider in names.items():
        ratios = [row["ratio"] for row in rows if row["provider"] == provider]
        assert f"| {line} | " + " | ".join(f"{float(r):.2f}" for r in ratios) + " |" in section
    calls = {row["provider"]: row["python_calls"] for row in rows}
    assert f"{calls['nsru group']} Python calls are left of PEFT's {calls['peft']}" in section
