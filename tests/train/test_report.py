"""The report says what results.json says, names what is missing, and needs nothing but itself."""

import html
import json
import math
import os
import re
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser

import pytest
from report_samples import demo_metrics, demo_results

from nsru_train.report import matched_damage, tables, write_report
from nsru_train.report.figures import utility
from nsru_train.report.summary import (
    best_few,
    damage_curve,
    ends,
    loss_series,
    mean_curve,
    runs,
    warnings,
)
from nsru_train.report.theme import COLOURS, series_style, themed_svg
from nsru_train.run_folder import RunFolder


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    run = RunFolder(tmp_path_factory.mktemp("demo"))
    for row in demo_metrics():
        run.log_metrics(row)
    run.write_results(demo_results())
    run.write_config({"rank": 8, "note": "<b>&"})
    return run, write_report(run.path).read_text()


class Tags(HTMLParser):
    """Collects attributes and ids, and checks that tags are closed in order."""

    VOID = frozenset(["meta", "br", "hr", "img", "path", "use", "rect", "image", "circle", "stop"])

    def __init__(self, page):
        super().__init__()
        self.attributes, self.ids, self.open = [], Counter(), []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs
        self.ids.update(value for name, value in attrs if name == "id")

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def page_of(folder, results, metrics=()):
    """The report of these results, as HTML."""
    run = RunFolder(folder)
    for row in metrics:
        run.log_metrics(row)
    run.write_results(results)
    return write_report(run).read_text()


def text_of(page):
    """What a reader sees: tags, style and drawings left out, white space as single spaces."""
    page = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def table_below(page, title):
    """Rows of the first table after a heading, as lists of texts."""
    section = page.split(f"<h2>{title}</h2>")[1].split("</section>")[0]
    table = re.search(r"<table.*?</table>", section, re.DOTALL)[0]
    return [
        [text_of(cell) for cell in re.findall(r"<t[hd]\b.*?</t[hd]>", row, re.DOTALL)]
        for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)
    ]


def test_page_has_every_part_and_pictures_on_disk(demo):
    run, page = demo
    names = [
        "frontier",
        "frontier-untouched",
        "utility",
        "steps",
        "losses",
        "spectrum",
        "editability",
        "leakage",
    ]
    for name in names:
        png = (run.figures_dir / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) > 10_000
        assert f'id="{name}-' in page
    assert page.count("<svg") == len(names)
    assert "Not recorded in this run" not in page


def test_page_is_well_formed_and_needs_nothing_from_outside(demo):
    _, page = demo
    tags = Tags(page)
    links = [value for name, value in tags.attributes if name in ("src", "href", "xlink:href")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert {link[1:] for link in links} <= tags.ids.keys()
    assert not re.search(r"url\((?!#)|@import|<script|<link", page)
    addresses = set(re.findall(r"\w+://[^\s\"'<]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "default-src 'none'" in page
    assert [name for name, count in tags.ids.items() if count > 1] == []
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ET.fromstring(svg)
    alts = re.findall(r'role="img" aria-label="([^"]+)"><svg', page)
    assert len(set(alts)) == page.count("<svg")
    assert all(len(alt) > 60 for alt in alts)


def test_pictures_follow_the_colour_scheme(demo):
    """No colour of the palette is left fixed in an embedded picture."""
    _, page = demo
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        fixed = {colour for colour in re.findall(r"#[0-9a-f]{6}\b", svg) if colour != "#000000"}
        assert fixed == set()
        assert "var(--ink-2)" in svg


def test_text_of_the_run_is_escaped(tmp_path):
    run = RunFolder(tmp_path)
    results = demo_results(seeds=(0,))
    evil = "<script>alert('x')</script>&"
    unbalanced = f"model.layers.0.$\\frac{{{evil}"
    modules = [f"model.layers.0.{evil}"]
    results["subspaces"] = [results["subspaces"][0] | {"name": evil, "modules": modules}]
    results["frontier"] = [
        row | {"method": f"{evil}{row['method']}"} for row in results["frontier"][:40]
    ]
    results["command"] = results["kind"] = evil
    results["examples"] = [
        {"split": evil, "question": evil, "original": evil, "before": evil, evil: evil}
    ]
    results["methods"].append({"method": evil, "seed": evil, "forget_prob": 0.5, evil: 1.0})
    results["metrics"] = {evil: {evil: 0.5}, f"{evil}2": 0.5}
    results["notes"] = [evil]
    results["leakage"] = [{"module": name, "leakage": 1.0} for name in (evil, unbalanced)]
    run.write_config({"evil": evil})
    run.environment_path.write_text(evil)
    page = page_of(tmp_path, results)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 20
    Tags(page)


def test_answers_table(demo):
    _, page = demo
    assert page.count("= original</span>") == 3 + 4
    assert page.count("= safe answer</span>") == 3
    assert "lighthouse &lt;North&gt; &amp; repaired nets" in page


def test_missing_parts_are_named(tmp_path):
    metrics = {"retain": {"probability": 0.91234, "rouge": None}, "model_utility": 0.62}
    page = page_of(tmp_path, {"kind": "eval", "metrics": metrics})
    missing = re.search(r"Not recorded in this run: (.*?)\.</p>", page)[1]
    assert missing == "Answers before and after", "the rest is of training"
    assert "at the end of every run" not in page
    assert "0.9123" in page
    assert "0.62" in page
    assert "config.yaml): not recorded" in page
    assert list((tmp_path / "figures").glob("*")) == []


def test_missing_parts_of_training_are_named(tmp_path):
    metrics = {"retain": {"probability": 0.91234}}
    page = page_of(tmp_path, {"kind": "train", "metrics": metrics})
    missing = re.search(r"Not recorded in this run: (.*?)\.</p>", page)[1]
    for part in ("Forgetting against retention", "Answers before and after", "Leakage", "Losses"):
        assert part in missing
    assert "Evaluation" not in missing


def test_train_run_with_one_method_and_one_seed(tmp_path):
    results = demo_results(seeds=(0,))
    frontier = [
        {key: value for key, value in row.items() if key != "retain_untouched_prob"}
        for row in results["frontier"]
        if row["method"] == "nsru"
    ]
    frontier[-1] = frontier[-1] | {"forget_prob": 0.0}
    frontier.append({"method": "nsru", "seed": 0, "step": 160, "forget_prob": None})
    metrics = [
        {"step": step, "loss": 3.0 / step, "safe": 1.0, "total": float("nan")}
        for step in range(1, 4)
    ]
    parts = {"kind": "train", "frontier": frontier, "subspaces": results["subspaces"][:1]}
    page = page_of(tmp_path, parts, metrics)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}.png" for name in ("frontier", "steps", "losses", "spectrum", "editability")
    }
    assert "at matched forgetting" not in page


def test_three_methods_and_two_seeds(tmp_path):
    """Methods come from the rows; each has its column, its line and its own verdict."""
    results = demo_results(seeds=(0, 1))
    for rows in (results["methods"], results["frontier"]):
        rows += [
            row | {"method": "simnpo", "forget_prob": 5 * row["forget_prob"]}
            for row in rows
            if row["method"] == "nsru"
        ]
    parts = {key: results[key] for key in ("methods", "frontier")}
    page = page_of(tmp_path, parts, demo_metrics(seeds=(0, 1), total=10))
    head, forgotten, *_ = table_below(page, "Before and after")
    assert head[1:] == ["Base model", "NSRU", "LoRA without projection", "simnpo"]
    assert "✓ Goal at most 0.1: met in 2 of 2 seeds" in forgotten[2]
    assert "✗ Goal at most 0.1: met in 0 of 2 seeds" in forgotten[4]
    damage = table_below(page, "Forgetting against retention")
    assert damage[0] == ["", "NSRU", "LoRA", "simnpo", "ratio to the best other"]
    assert [row[0] for row in damage[1:]] == ["seed 0", "seed 1"]
    matched = matched_damage(results)
    for row, shown in zip(matched, damage[1:], strict=True):
        least = min(row["lora_damage"], row["simnpo_damage"])
        assert row["ratio"] == pytest.approx(row["nsru_damage"] / least)
        assert shown[-1] == f"{row['ratio']:.2f}×"
    assert "NSRU against LoRA without projection, simnpo, at matched forgetting" in text_of(page)
    assert "does less damage than every other method in" in text_of(page)
    runs = table_below(page, "Evaluation")[0]
    assert runs[-2:] == ["simnpo, seed 0", "simnpo, seed 1"]
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert "var(--series-2)" in svg or "simnpo" not in svg


def with_methods(made):
    """Results with further methods: how much slower NSRU's steps forget by each, and the harm."""
    results = demo_results(seeds=(0, 1))
    for rows in (results["methods"], results["frontier"]):
        for row in [row for row in rows if row["method"] == "nsru"]:
            for name, (slow, harm) in made.items():
                unseen = 0.998 - harm * (0.998 - row["retain_unseen_prob"])
                forget = min(1.0, slow * row["forget_prob"] + 0.1 * (slow > 1))
                rows.append(
                    row | {"method": name, "forget_prob": forget, "retain_unseen_prob": unseen}
                )
    return results


def test_where_hardly_a_method_forgets_the_page_says_so(tmp_path):
    slow = [f"{name}{end}" for name in ("npo", "dpo", "idk") for end in ("", " projected")]
    results = with_methods(dict.fromkeys(slow, (9, 1)))
    for rows in (results["methods"], results["frontier"]):
        for row in rows:
            if row["method"] == "lora":
                row["forget_prob"] = max(row["forget_prob"], 0.3)
    matched = matched_damage(results)
    assert matched[0]["forget_prob"] > 0.1
    page = text_of(page_of(tmp_path, {key: results[key] for key in ("methods", "frontier")}, []))
    assert "are not compared" not in page
    assert f"forgot least ended, at {matched[0]['forget_prob']:.2f}, and little" in page


def test_many_methods_have_a_row_each_and_those_that_do_not_forget_none(tmp_path):
    made = {"npo": (1, 4), "npo projected": (1, 1), "dpo": (1, 9), "dpo projected": (1, 2)}
    results = with_methods(made | {"idk": (9, 1), "idk projected": (9, 1)})
    matched = matched_damage(results)
    assert not {"idk_damage", "idk projected_damage"} & matched[0].keys()
    rivals = [matched[0][f"{name}_damage"] for name in ("lora", "npo", "dpo")]
    assert matched[0]["ratio"] == pytest.approx(matched[0]["nsru_damage"] / min(rivals))
    parts = {key: results[key] for key in ("methods", "frontier")}
    page = page_of(tmp_path, parts, [])
    assert "Methods that did not come to a forget probability of 0.1" in text_of(page)
    damage = table_below(page, "Forgetting against retention")
    assert damage[0] == ["", "seed 0", "seed 1", "mean"]
    assert len(damage) == 1 + 2 + 4
    means = [float(row[-1]) for row in damage[1:]]
    assert means == sorted(means)
    assert "does not forget" in page
    assert "Forgetting against utility" in text_of(page)
    (kept,) = (axes for axes in utility(results, [*ends(results, "forget_prob")]).axes)
    names = [label.get_text() for label in kept.get_yticklabels()]
    assert names[0].lower() == "idk", "what does not forget is below all others"
    assert "NSRU against all others without projection" in text_of(page)
    headline = table_below(page, "Before and after")
    assert [row[0] for row in headline[1:4]] == ["Base model", "NSRU", "LoRA without projection"]
    assert len(headline) == 2 + 8
    evaluation = table_below(page, "Evaluation")
    assert len(evaluation) == 1 + len(results["methods"])
    assert best_few(results) == ["nsru", "npo projected", "dpo projected", "lora", "npo"]
    assert {"frontier-best.png", "utility-best.png"} <= {*os.listdir(tmp_path / "figures")}


def test_more_methods_than_colours_differ_in_their_dashes():
    names = [f"method {i}" for i in range(13)]
    styles = [tuple(series_style(name, names).values()) for name in names]
    assert len(set(styles)) == len(names)


@pytest.mark.usefixtures("without_figures")
def test_train_run_opens_with_before_and_after(tmp_path):
    rows = [
        {
            "method": "before",
            "seed": 0,
            "forget_prob": 0.99,
            "safe_prob": 1e-5,
            "retain_prob": 0.98,
        },
        {
            "method": "nsru",
            "seed": 0,
            "forget_prob": 0.05,
            "safe_prob": 0.8,
            "retain_prob": 0.5,
            "step_seconds": 0.25,
            "stopped_early": "the retain loss reached 3",
        },
    ]
    results = {
        "kind": "train",
        "setup": {"questions": {"forget": 40, "retain": 200}},
        "methods": rows,
        "leakage": [{"module": "model.layers.0.q_proj", "leakage": 1e-8}],
    }
    metrics = [{"step": step, "safe": 1.0, "total": 3.0 / step} for step in (1, 2, 3)]
    page = page_of(tmp_path, results, metrics)
    assert re.findall(r"<h2>(.*?)</h2>", page)[:2] == ["⚠ Read this first", "Before and after"]
    assert "nsru, seed 0: stopped early (the retain loss reached 3)" in page
    assert table_below(page, "Before and after")[1:] == [
        ["Forgotten answers 40 questions", "0.990", "0.050 ✓ Goal at most 0.1: met"],
        ["Safe answers 40 questions", "<0.001", "0.800 ✓ Goal at least 0.7: met"],
        [
            "Retain answers trained on 200 questions",
            "0.980",
            "0.500 ✗ Goal at least 90% of before: not met",
        ],
    ]
    assert ["seconds a step", "–", "0.25"] in table_below(page, "Evaluation")
    assert table_below(page, "Losses over the steps")[1] == ["1", "3", "1"]
    assert ["q_proj", "1", "1e-08", "1e-08"] in table_below(
        page, "Leakage of the exported adapters"
    )


def test_eval_run_shows_metrics_then_both_models_answers_and_the_configuration(tmp_path):
    examples = [
        {
            "split": "forget",
            "question": "Who?",
            "original": "Ann.",
            "safe_target": "No idea.",
            "before": "Ann.",
            "after": " No idea. ",
        },
        {"split": "retain", "question": "Where?", "original": "Oslo.", "before": "", "after": None},
    ]
    run = RunFolder(tmp_path)
    run.write_config({"adapter": "runs/nsru/adapter"})
    page = page_of(
        tmp_path,
        {
            "kind": "eval",
            "metrics": {"forget": {"probability": 0.25, "count": 12}},
            "examples": examples,
        },
    )
    assert page.index("<h2>Evaluation") < page.index("<h2>Answers before and after")
    assert table_below(page, "Evaluation") == [
        ["split", "p(answer)", "n"],
        ["forget", "0.25", "12"],
    ]
    text = text_of(page)
    for part in (
        "forget questions , 1 of 12 Who? Original answer Ann. Safe answer No idea. "
        "Base model = original Ann. Evaluated model = safe answer No idea.",
        "retain questions Where? Original answer Oslo. Base model (empty) "
        "Evaluated model not generated",
        "adapter: runs/nsru/adapter",
    ):
        assert part in text
    assert "Not recorded in this run" not in text


def test_evaluation_of_one_model_speaks_of_no_other(tmp_path):
    example = {"split": "forget", "question": "Who?", "before": None, "after": "Ann."}
    page = page_of(tmp_path, {"kind": "eval", "metrics": {"privleak": 1}, "examples": [example]})
    text = text_of(page)
    assert "<h2>Answers</h2>" in page
    assert "Who? The model's answer Ann." in text
    for word in ("Evaluated model", "Base model", "before and after", "the same questions"):
        assert word not in text


@pytest.mark.parametrize("value", [None, [], {}], ids=str)
def test_values_that_are_missing(tmp_path, value):
    """Null, or nothing at all, for every part of results.json."""
    keys = ("methods", "frontier", "subspaces", "leakage", "examples", "metrics", "notes", "setup")
    page = page_of(tmp_path, dict.fromkeys([*keys, "kind", "seconds", "command"], value))
    assert "Before and after" in re.search(r"Not recorded in this run: (.*?)\.</p>", page)[1]


def test_rows_without_numbers(tmp_path):
    results = {
        "methods": [
            {"method": "before", "seed": 0, "forget_prob": None},
            {"method": "nsru", "seed": 0, "forget_prob": 0.2, "retain_prob": 0.9},
            {"method": "nsru", "seed": 1, "forget_prob": None, "retain_prob": None},
        ],
        "frontier": [{"method": "nsru", "seed": 0, "step": 1, "forget_prob": None}],
        "subspaces": [{"name": "a", "rank": None, "editability": None, "spectrum": [None, 0.1]}],
        "leakage": [{"module": "a", "leakage": None}],
        "examples": [{"question": "Who?"}],
        "metrics": {"forget": {"probability": None}, "privleak": None},
    }
    page = page_of(tmp_path, results, [{"step": None, "total": 1.0}, {"step": 1, "total": None}])
    rows = table_below(page, "Before and after")
    assert rows[1] == ["Forgotten answers", "–", "0.200 ✗ Goal at most 0.1: not met"]
    assert rows[2] == [
        "Retain answers trained on",
        "–",
        "0.900 ✗ Goal at least 90% of before: not met",
    ]
    assert "Leakage into the retain subspace exceeds 1e-06 in 1 of 1 adapters" in page


def point(method, seed, step, forget, unseen):
    return {
        "method": method,
        "seed": seed,
        "step": step,
        "forget_prob": forget,
        "retain_unseen_prob": unseen,
    }


def comparison(nsru_end, lora_end):
    return {
        "methods": [
            {"method": "before", "seed": 0, "forget_prob": 1.0, "retain_unseen_prob": 0.9},
            {"method": "before", "seed": 1, "forget_prob": 1.0, "retain_unseen_prob": 0.8},
        ],
        "frontier": [
            point("nsru", 0, 1, 0.20, 0.89),
            point("nsru", 0, 2, 0.05, nsru_end),
            point("nsru", 0, 3, 0.02, nsru_end - 0.1),
            point("lora", 0, 1, 0.04, lora_end),
            point("lora", 0, 2, 0.04, lora_end - 0.2),
            point("nsru", 1, 1, 0.06, 0.79),
            point("lora", 1, 1, 0.06, 0.78),
        ],
    }


def test_matched_damage_by_hand():
    """The level is the worst run's best, 0.06; each run counts its least damage from there on."""
    first, second = matched_damage(comparison(0.88, 0.86))
    assert first["forget_prob"] == second["forget_prob"] == 0.06
    assert (first["seed"], first["nsru_step"], first["lora_step"]) == (0, 2, 1)
    assert first["nsru_damage"] == pytest.approx(0.02)
    assert first["lora_damage"] == pytest.approx(0.04)
    assert first["ratio"] == pytest.approx(0.5)
    assert second["ratio"] == pytest.approx(0.5)


def test_what_trains_nothing_is_compared_with_no_one():
    results = comparison(0.88, 0.86)
    guarded = [
        {**row, "method": "eco", "lr": 0.0}
        for row in results["frontier"]
        if row["method"] == "lora"
    ]
    more = results | {"frontier": [*results["frontier"], *guarded]}
    assert matched_damage(more) == matched_damage(results)


def test_matched_damage_needs_both_methods_and_a_before():
    results = comparison(0.88, 0.86)
    one = [row for row in results["frontier"] if row["method"] == "nsru"]
    assert matched_damage(results | {"frontier": one}) == []
    assert matched_damage(results | {"methods": []}) == []


@pytest.mark.parametrize(
    ("nsru_end", "lora_end", "expected"),
    [
        (0.88, 0.86, ["0.50×", "✓ NSRU does less damage in 2 of 2 seeds"]),
        (0.70, 0.86, ["3.50×", "✗ NSRU does less damage in 1 of 2 seeds", "5.00×"]),
        (0.88, 0.95, ["no ratio: LoRA did no measurable damage", "1 of 2"]),
        (0.92, 0.86, ["0×", "NSRU did no measurable damage"]),
    ],
)
@pytest.mark.usefixtures("without_figures")
def test_headline_reports_the_comparison_as_it_is(tmp_path, nsru_end, lora_end, expected):
    page = text_of(page_of(tmp_path, comparison(nsru_end, lora_end)))
    for text in expected:
        assert text in page


@pytest.mark.usefixtures("without_figures")
def test_headline_counts_seeds_that_miss_a_goal(tmp_path):
    results = demo_results()
    runs = [row for row in results["methods"] if row["method"] == "nsru"]
    runs[1]["forget_prob"] = 0.4
    head, forgotten, safe, *_ = table_below(page_of(tmp_path, results), "Before and after")
    assert head == ["mean probability", "Base model", "NSRU", "LoRA without projection"]
    assert "✗ Goal at most 0.1: met in 2 of 3 seeds" in forgotten[2]
    assert "✓ Goal at most 0.1: met in 3 of 3 seeds" in forgotten[3]
    assert "✓ Goal at least 0.7: met in 3 of 3 seeds" in safe[2]


def test_damage_curve_is_the_pareto_front():
    points = [
        point("nsru", 0, i, f, u)
        for i, (f, u) in enumerate([(0.5, 0.8), (0.1, 0.7), (0.2, 0.9), (0.9, 0.9)])
    ]
    assert damage_curve(points, 1.0) == [(0.1, pytest.approx(0.3)), (0.2, pytest.approx(0.1))]


def test_mean_uses_only_steps_that_all_seeds_reached():
    found = runs(
        [point("nsru", 0, 1, 0.4, 1), point("nsru", 0, 2, 0.1, 1), point("nsru", 1, 1, 0.2, 1)],
        "forget_prob",
    )
    seeds = found["nsru"].values()
    mean = mean_curve([(row["step"], row["forget_prob"]) for row in rows] for rows in seeds)
    assert mean == [(1, pytest.approx(0.3))]
    assert [len(rows) for rows in seeds] == [2, 1]


def test_losses_after_a_resume_keep_the_later_line():
    rows = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 9.0},
        {"step": 2, "loss": 2.0, "retain_loss": 1.0},
    ]
    series = loss_series([*rows, {"loss": 5.0}, {"step": 3, "retain_prob": 0.5}])
    assert series == {
        "Total": {("train", 0): [(1.0, 3.0), (2.0, 2.0)]},
        "Retain": {("train", 0): [(2.0, 1.0)]},
    }


def test_warnings_name_collapse_leakage_and_short_ranks():
    results = demo_results()
    (text,) = warnings(results)
    assert "Fewer directions were found than asked for" in text
    assert "layers.5.self_attn.o_proj" in text
    for row in results["subspaces"]:
        row["captured_energy"] = 1.0  # the data has no more, which is usual
    assert not warnings(results)
    results["methods"][1]["retain_prob"] = 0.1
    results["leakage"][3] = {"module": "model.layers.0.x", "leakage": 0.02}
    found = " ".join(warnings(results))
    assert "nsru, seed 0: collapsed" in found
    assert "exceeds 1e-06 in 1 of 42 adapters (worst: model.layers.0.x, 0.02)" in found


def test_the_table_of_subspaces_tells_how_far_both_sets_are_apart():
    table = tables.subspaces([*demo_results()["subspaces"], {"name": "unmeasured"}])
    place = table.head.index("separation")
    *measured, bare = (row[place] for row in table.rows)
    assert (set(measured), bare) == ({"1.8"}, "–")


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_palette_can_be_read(scheme):
    """WCAG contrast against the surface: 4.5 for text, 3 for lines that carry meaning."""
    surface = luminance(COLOURS["surface"][scheme])

    def contrast(name):
        bright, dark = sorted((surface, luminance(COLOURS[name][scheme])), reverse=True)
        return (bright + 0.05) / (dark + 0.05)

    for name in ("ink", "ink-2", "good", "bad"):
        assert contrast(name) >= 4.5, name
    for name in ("muted", *(f"series-{i}" for i in range(6))):
        assert contrast(name) >= 3, name


def test_palette_colours_are_distinct():
    """themed_svg finds a colour's name by its light value."""
    lights = [light for light, _ in COLOURS.values()]
    assert len(set(lights)) == len(lights)
    svg = '<?xml?><svg width="1pt" height="2pt" viewBox="0 0 1 2"><g id="a" fill="#16181b"/></svg>'
    assert themed_svg(svg, "p") == '<svg viewBox="0 0 1 2"><g id="p-a" fill="var(--ink)"/></svg>'


def test_many_layers_and_zero_leakage(tmp_path):
    names = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "gate"]
    subspaces = [
        {
            "name": f"m.layers.{layer}.{name}",
            "modules": [f"m.layers.{layer}.{name}"],
            "rank": 4,
            "captured_energy": 0.9,
            "editability": 0.0,
            "spectrum": [math.exp(-i) for i in range(8)],
        }
        for layer in range(32)
        for name in names
    ]
    leakage = [{"module": "m.layers.0.q_proj", "leakage": 0.0}]
    page = page_of(tmp_path, {"kind": "train", "subspaces": subspaces, "leakage": leakage})
    assert "all inputs" in page
    assert (tmp_path / "figures" / "leakage.png").exists()


def test_untouched_retain_answers_are_compared_on_their_own(demo):
    """In the sample NSRU does 2.5 / 1.3 times its usual share of damage there."""
    run, page = demo
    results = run.read_results()
    unseen = matched_damage(results)
    untouched = matched_damage(results, "retain_untouched_prob")
    for a, b in zip(unseen, untouched, strict=True):
        assert b["ratio"] == pytest.approx(a["ratio"] * 2.5 / 1.3, rel=0.15)
    assert "Damage to untouched retain answers" in page
    assert (run.figures_dir / "frontier-untouched.png").exists()


@pytest.mark.parametrize(
    ("commit", "shown"),
    [("0123456789abcdef-dirty", " · commit 0123456789ab with changes"), (None, "")],
)
def test_header_tells_where_it_ran(tmp_path, commit, shown):
    environment = {
        "packages": {"torch": "2.13.0"},
        "cuda": {"gpus": []},
        "cpu": {"model": "Some CPU"},
        "commit": commit,
        "time": "2026-01-02T03:04:05+00:00",
    }
    RunFolder(tmp_path).environment_path.write_text(json.dumps(environment))
    metrics = {"model_utility": 0.5}
    page = page_of(tmp_path, {"kind": "eval", "seconds": 75.2, "metrics": metrics})
    assert f"1 min 15 s · torch 2.13.0 · Some CPU{shown} · 2026-01-02" in page
