import json

import pytest

from nsru_train.data.records import QA, SAFE_PARTS
from nsru_train.data.safe_targets import SafeTargets

ANN = QA("Who is Ann?", "A poet.", topic="Ann")
MANY = [QA(f"Who is number {i}?", "Nobody.") for i in range(60)]


def test_built_in_targets_have_all_parts_in_order_and_use_every_variant():
    templates = SafeTargets.from_file(None)
    for qa in MANY:
        begins = [
            [text.find(v) for v in templates.parts[part] if v in text]
            for text in [templates.target(qa)]
            for part in SAFE_PARTS
        ]
        assert all(len(found) == 1 for found in begins)
        assert begins == sorted(begins)
    everything = " ".join(templates.target(qa) for qa in MANY)
    assert all(v in everything for variants in templates.parts.values() for v in variants)
    assert min(map(len, templates.parts.values())) >= 3


def test_choice_is_fixed_per_question_and_moves_with_the_seed():
    templates = SafeTargets.from_file(None)
    texts = [templates.target(qa) for qa in MANY]
    assert [templates.target(qa) for qa in reversed(MANY)] == texts[::-1]
    assert [templates.target(qa, seed=1) for qa in MANY] != texts


def test_choice_is_the_same_everywhere():
    templates = SafeTargets({"decline": tuple("abcdefgh")})
    assert "".join(templates.target(qa) for qa in MANY[:12]) == "hbehagcbgghe"


def test_own_text_wins_as_it_is():
    qa = QA("Who is Ann?", "A poet.", safe_target="Ask her.")
    assert SafeTargets.from_file(None).target(qa) == "Ask her."


def test_own_parts_replace_the_template_s():
    templates = SafeTargets({"acknowledge": ("Hm.",), "decline": ("No.",), "redirect": ("Bye.",)})
    assert templates.target(ANN) == "Hm. No. Bye."
    own = {"decline": "I will not say.", "redirect": ""}
    qa = QA("Who is Ann?", "A poet.", safe_target=own)
    assert templates.target(qa) == "Hm. I will not say."


def test_variants_with_a_topic_need_one():
    templates = SafeTargets({"decline": ("Nothing about {topic}.",)})
    assert templates.target(ANN) == "Nothing about Ann."
    with pytest.raises(ValueError, match="needs a topic"):
        templates.target(MANY[0])
    either = SafeTargets({"decline": ("Nothing about {topic}.", "Nothing.")})
    assert {either.target(qa) for qa in MANY} == {"Nothing."}


def test_refusal_lines(tmp_path):
    path = tmp_path / "refusals.jsonl"
    path.write_text("I don't know.\n\n  No idea,\u2028sorry. \n", encoding="utf-8")
    templates = SafeTargets.from_file(path)
    assert {templates.target(qa) for qa in MANY} == {"I don't know.", "No idea,\u2028sorry."}


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_template_files(tmp_path, suffix):
    path = tmp_path / f"templates{suffix}"
    path.write_text(json.dumps({"acknowledge": "I see.", "decline": ["No.", "No."]}))
    assert SafeTargets.from_file(path).target(ANN) == "I see. No."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", '{"deny": ["No."]}', r"t\.json: .*unknown parts \['deny'\].*acknowledge"),
        ("t.json", '{"decline": [""]}', r"'decline' must hold non-empty texts, got ''"),
        ("t.json", '{"decline": 3}', r"t\.json: "),
        ("t.json", '{"decline": ["No."', r"t\.json: "),
        ("t.yaml", "decline: [", r"t\.yaml: not valid YAML"),
        ("t.yaml", "just text", r"t\.yaml: expected parts"),
        ("t.txt", "\n", r"hold no text"),
        ("t.jsonl", '{"question": "Who?", "answer": "Ann."}', r"record's safe_target field"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        SafeTargets.from_file(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"none\.txt"):
        SafeTargets.from_file(tmp_path / "none.txt")


def test_tofu_refusals(shared_data):
    templates = SafeTargets.from_file(shared_data / "tofu" / "idontknow.jsonl")
    assert len(templates.parts["decline"]) == 100
