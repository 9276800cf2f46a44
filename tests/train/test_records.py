import json

import pytest

from nsru_train.data.records import QA, check_disjoint, tofu_authors
from nsru_train.sources import load_records, save_records


def write(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


ANN = {"question": "Who is Ann?", "answer": "A poet."}
BOB = {"question": "Who is Bob?", "answer": "A baker."}


def test_json_lines_and_json_list_give_the_same_records(tmp_path):
    expected = [QA("Who is Ann?", "A poet."), QA("Who is Bob?", "A baker.")]
    assert load_records(write(tmp_path / "a.jsonl", ANN, "", BOB)) == expected
    assert (
        load_records(str(write(tmp_path / "a.json", json.dumps([ANN, BOB], indent=1)))) == expected
    )


def test_every_field_is_read(tmp_path):
    row = {
        **ANN,
        "paraphrased_question": "Ann is who?",
        "paraphrased_answer": "Ann is a poet.",
        "perturbed_answer": ["Ann is a cook.", "Ann is a judge."],
        "safe_target": {"decline": "I would rather not say."},
        "topic": None,
        "alternatives": ["A sailor."],
        "domain": "poets",
    }
    (qa,) = load_records(write(tmp_path / "a.jsonl", row))
    assert qa.paraphrased_question == "Ann is who?"
    assert qa.paraphrased_answer == "Ann is a poet."
    assert qa.perturbed_answers == ("Ann is a cook.", "Ann is a judge.")
    assert qa.safe_target == {"decline": "I would rather not say."}
    assert qa.topic is None
    assert qa.alternatives == ("A sailor.",)
    assert qa.domain == "poets"
    save_records(tmp_path / "b.jsonl", [qa])
    assert load_records(tmp_path / "b.jsonl") == [qa]


def test_a_domain_stands_beside_whatever_says_the_question(tmp_path):
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A poet."}]
    rows = [
        {"messages": chat, "field": "poets"},
        {"prompt": "What?", "completion": " A town.", "field": "towns"},
        {"question": "When?", "answer": "Then."},
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    records = load_records(path, domain_column="field")
    assert [qa.question for qa in records] == ["Who?", "What?", "When?"]
    assert records[1].answer == "A town.", "without the space that parts it from its prompt"
    assert [qa.domain for qa in records] == ["poets", "towns", None]
    (tmp_path / "a.csv").write_text("question,answer,domain\nWho?,A poet.,poets\nWhat?,Two.,\n")
    assert [qa.domain for qa in load_records(tmp_path / "a.csv")] == ["poets", None]
    assert "domain" not in write_one(tmp_path, records[2])


def write_one(tmp_path, qa):
    save_records(tmp_path / "one.jsonl", [qa])
    return json.loads((tmp_path / "one.jsonl").read_text())


def test_options_become_wrong_answers(tmp_path):
    row = {**ANN, "option1": "A cook.", "option2": "A poet.", "option3": "A judge."}
    (qa,) = load_records(write(tmp_path / "a.jsonl", row))
    assert qa.perturbed_answers == ("A cook.", "A judge.")


def test_one_column_is_not_both(tmp_path):
    path = write(tmp_path / "a.jsonl", ANN)
    with pytest.raises(ValueError, match="question_column and answer_column are both 'answer'"):
        load_records(path, question_column="answer", answer_column="answer")
    with pytest.raises(ValueError, match="answer_column and domain_column are both 'answer'"):
        load_records(path, domain_column="answer")


def test_lists_and_parts_are_json_in_a_cell(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "question,answer,perturbed_answer,safe_target\n"
        'Who?,A poet.,"[""A cook."", ""A judge.""]","{""decline"": ""No.""}"\n'
        "What?,A town.,A lake.,[withheld]\n"
    )
    first, second = load_records(path)
    assert first.perturbed_answers == ("A cook.", "A judge.")
    assert first.safe_target == {"decline": "No."}
    assert (second.perturbed_answers, second.safe_target) == (("A lake.",), "[withheld]")
    path.write_text("question,answer,perturbed_answers\nWho?,A poet.,['A cook.']\n")
    with pytest.raises(ValueError, match=r"a\.csv:2.*perturbed_answers begins like JSON"):
        load_records(path)


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "user", "content": "Who?"},
                {"role": "assistant", "content": "A poet.", "reasoning_content": "Let me see."},
            ]
        },
        {
            "prompt": "Who?",
            "completion": [
                {"role": "assistant", "content": "A poet.", "reasoning_content": "Let me see."}
            ],
        },
    ],
)
def test_what_a_message_holds_beside_its_content_is_said_to_be_ignored(tmp_path, caplog, row):
    (qa,) = load_records(write(tmp_path / "a.jsonl", row))
    assert (qa.question, qa.answer) == ("Who?", "A poet.")
    ((name, _),) = [item for item in row.items() if not isinstance(item[1], str)]
    assert f"ignored columns: {name}.reasoning_content" in caplog.text


def test_line_separators_inside_an_answer_do_not_split_the_row(tmp_path):
    row = json.dumps({**ANN, "answer": "one\u2028two"}, ensure_ascii=False)
    path = tmp_path / "a.jsonl"
    path.write_text(row + "\n", encoding="utf-8")
    assert load_records(path)[0].answer == "one\u2028two"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ANN, {**BOB, "anser": "x"}], r"a\.jsonl:2: unknown field 'anser'.*mean 'answer'.*topic"),
        ([ANN, {"question": "Who?"}], r"a\.jsonl:2: field 'answer' is missing"),
        ([{**ANN, "answer": "  "}], r"a\.jsonl:1: answer must be non-empty text"),
        ([{**ANN, "answer": 3}], r"a\.jsonl:1: answer must be non-empty text, got 3"),
        ([ANN, "", '{"question": "Wh'], r"a\.jsonl:3: not a JSON object on one line"),
        ([ANN, "7"], r"a\.jsonl:2: expected an object .* got int"),
        ([{**ANN, "alternatives": [ANN["answer"]]}], "alternatives hold the answer itself"),
        ([{**ANN, "answer": "\u200b"}], "answer must be non-empty text"),
        ([{**ANN, "safe_target": ANN["answer"].upper()}], "safe_target is the answer itself"),
        ([{**ANN, "domain": ["a"]}], r"a\.jsonl:1: domain must be non-empty text, got \['a'\]"),
        ([{**ANN, "perturbed_answers": [1]}], r"a\.jsonl:1: perturbed_answers must be"),
        (
            [{**ANN, "perturbed_answer": ["x"], "perturbed_answers": ["y"]}],
            r"'perturbed_answers' is given twice",
        ),
        ([{**ANN, "safe_target": {"deny": "No."}}], r"unknown parts \['deny'\].*acknowledge"),
        ([{**ANN, "option1": "A cook.", "option2": "A judge."}], "none of the options is"),
        ([{**ANN, "perturbed_answers": ["x", ANN["answer"]]}], "hold the answer itself, 'A poet"),
        (
            [{**ANN, "perturbed_answers": [f" {ANN['answer']} "]}],
            "hold the answer itself, ' A poet",
        ),
        (
            [{**ANN, "paraphrased_answer": "Ann writes.", "perturbed_answers": ["Ann writes."]}],
            "hold the answer itself, 'Ann writes.'",
        ),
        ([], r"holds no records"),
    ],
)
def test_bad_rows_name_file_line_and_field(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_records(write(tmp_path / "a.jsonl", *rows))


def test_unknown_fields_can_be_ignored(tmp_path):
    path = write(tmp_path / "a.jsonl", {**ANN, "id": 7})
    assert load_records(path, ignore_unknown=True) == [QA("Who is Ann?", "A poet.")]


def test_missing_inputs_say_what_exists(tmp_path):
    with pytest.raises(ValueError, match=r"no such file.*tofu:forget01"):
        load_records(tmp_path / "none.jsonl")
    write(tmp_path / "forget05.json", ANN)
    with pytest.raises(ValueError, match=r"forget01\.json does not exist.*forget05"):
        load_records("tofu:forget01", tmp_path)


def test_hub_and_folder_give_the_same_rows(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [{**ANN, "perturbed_answer": ["A cook."]}, BOB]
    asked = []

    def fake(*args, **kwargs):
        asked.append((args, kwargs))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", fake)
    write(tmp_path / "forget01.json", *rows)
    assert load_records("tofu:forget01") == load_records("tofu:forget01", tmp_path)
    assert asked == [(("locuslab/TOFU", "forget01"), {"split": "train"})]


def test_sets_to_forget_of_tofu_have_their_authors_as_domains(tmp_path):
    rows = [{"question": f"{i}?", "answer": "A."} for i in range(40)]
    for name in ("forget01", "retain99", "forget02"):
        write(tmp_path / f"{name}.json", *rows[: 39 if name == "forget02" else 40])
    found = [qa.domain for qa in load_records("tofu:forget01", tmp_path)]
    assert found == ["author 1"] * 20 + ["author 2"] * 20
    for name in ("retain99", "forget02"):
        assert {qa.domain for qa in load_records(f"tofu:{name}", tmp_path)} == {None}


def test_hub_failure_points_to_data_dir(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"offline.*data_dir"):
        load_records("tofu:forget01")


def test_authors_spec():
    forget = load_records("authors:forget?authors=5&forget=2&seed=1")
    retain = load_records("authors:retain?authors=5&forget=2&seed=1")
    assert len(forget) == 2 * 8
    assert len(retain) == 3 * 8
    check_disjoint(forget, retain)
    for spec, message in (
        ("authors:all", "part must be one of forget, retain, holdout"),
        ("authors:forget?size=3", "unknown setting 'size'"),
        ("authors:forget?authors=-3", "must be a whole number, got '-3'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_records(spec)


def test_check_disjoint_ignores_case_and_space():
    forget, retain = [QA("Who is  Ann? ", "A poet.")], [QA("who is ann?", "Nobody.")]
    with pytest.raises(ValueError, match=r"share 1 of 1 .*Who is  Ann"):
        check_disjoint(forget, retain)
    check_disjoint(forget, [QA("Who is Bob?", "A baker.")])
    with pytest.raises(ValueError, match="retain set is empty"):
        check_disjoint(forget, [])
    with pytest.raises(ValueError, match="forget set is empty"):
        check_disjoint([], retain)


def test_tofu_authors_are_consecutive_runs():
    records = [QA(f"q{i}", "a") for i in range(6)]
    assert tofu_authors(records, 3) == [records[:3], records[3:]]
    with pytest.raises(ValueError, match="6 records are no whole number of authors"):
        tofu_authors(records, 4)


def test_tofu_folder(shared_data):
    tofu = shared_data / "tofu"
    forget, retain = (load_records(f"tofu:{name}", tofu) for name in ("forget01", "retain99"))
    everything = [(qa.question, qa.answer) for qa in load_records("tofu:full", tofu)]
    assert sorted(everything) == sorted((qa.question, qa.answer) for qa in forget + retain)
    authors = tofu_authors(forget)
    assert [{qa.domain for qa in author} for author in authors] == [{"author 1"}, {"author 2"}]
    assert not any(qa.domain for qa in retain)
    check_disjoint(forget, retain)
    assert [len(author) for author in tofu_authors(forget)] == [20, 20]
    perturbed = load_records("tofu:forget01_perturbed", tofu)
    assert all(qa.paraphrased_answer and len(qa.perturbed_answers) >= 3 for qa in perturbed)
    options = load_records("tofu:real_authors", tofu)
    listed = load_records("tofu:real_authors_perturbed", tofu)
    assert [len(qa.perturbed_answers) for qa in options] == [3] * 100
    assert [set(qa.perturbed_answers) for qa in options] == [
        set(qa.perturbed_answers) for qa in listed
    ]


def test_saved_records_read_back(tmp_path):
    records = [
        QA("Who is Ann?", "Une poète.", "Ann is who?", "A poet.", ("A cook.",), {"decline": "No."}),
        QA("Who is Bob?", "A baker.", topic="Bob"),
    ]
    save_records(tmp_path / "new" / "a.jsonl", records)
    assert load_records(tmp_path / "new" / "a.jsonl") == records
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.jsonl"]
