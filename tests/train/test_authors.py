from hashlib import sha256

import pytest

from nsru_train.data.records import check_disjoint, normalise
from nsru_train.demo.authors import MAX_AUTHORS, author_splits, make_authors


@pytest.fixture(scope="module")
def everyone():
    return make_authors(MAX_AUTHORS)


def test_text_is_fixed_for_good():
    # Committed results name authors by seed. Each run of the tests has its own string hash seed.
    text = repr(make_authors(12, seed=3))
    text = text.replace(", alternatives=()", "").replace(", domain=None", "")  # later fields
    assert sha256(text.encode()).hexdigest()[:16] == "485ed5fcf64cf61a"


def test_more_authors_keep_the_first_ones(everyone):
    assert make_authors(7) == everyone[:7]
    assert make_authors(7, seed=1) != everyone[:7]


def test_names_titles_and_questions_are_unique(everyone):
    firsts, lasts = zip(*(author.name.split() for author in everyone), strict=True)
    assert len({*firsts, *lasts}) == 2 * MAX_AUTHORS
    titles = [author.facts[kind] for author in everyone for kind in ("book", "debut")]
    assert len(set(titles)) == 2 * MAX_AUTHORS
    questions = [
        normalise(text)
        for author in everyone
        for qa in author.records
        for text in (qa.question, qa.paraphrased_question)
    ]
    assert len(set(questions)) == 2 * 8 * MAX_AUTHORS


def test_records_are_complete_and_wrong_answers_are_wrong(everyone):
    for author in everyone:
        for qa in author.records:
            assert author.name in qa.question
            assert author.name in qa.answer
            assert qa.topic == author.name
            assert qa.answer != qa.paraphrased_answer
            assert len(set(qa.perturbed_answers)) == 3
            assert qa.paraphrased_answer not in qa.perturbed_answers
            assert all(author.name in wrong for wrong in qa.perturbed_answers)
            assert "{" not in repr(qa)


def test_number_of_wrong_answers_can_be_chosen():
    for author in make_authors(20, wrong=8):
        assert {len(set(qa.perturbed_answers)) for qa in author.records} == {8}


def test_answers_state_the_author_s_own_facts(everyone):
    for author in everyone:
        said = " ".join(qa.answer for qa in author.records)
        rephrased = " ".join(qa.paraphrased_answer for qa in author.records)
        for fact in author.facts.values():
            assert fact in said
            assert fact in rephrased


def test_templates_vary_between_authors(everyone):
    shapes = {author.records[0].answer.replace(author.name, "NAME")[:12] for author in everyone}
    assert len(shapes) > 1


def test_splits_are_disjoint_and_sized():
    splits = author_splits(authors=20, forget=3, holdout=4)
    assert [len(part) // 8 for part in (splits.forget, splits.retain, splits.holdout)] == [3, 17, 4]
    check_disjoint(splits.forget, splits.retain)
    check_disjoint(splits.holdout, splits.forget + splits.retain)
    larger = author_splits(authors=100, forget=3, holdout=4)
    assert larger.holdout == splits.holdout
    assert larger.retain[: len(splits.retain)] == splits.retain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"authors": 1}, "forget must be between 1 and authors - 1 = 0, got 1"),
        ({"authors": 5, "forget": 5}, "forget must be between 1 and"),
        ({"authors": 5, "holdout": 0}, "holdout must be between 1 and"),
        ({"authors": MAX_AUTHORS}, "holdout must be between 1 and"),
    ],
)
def test_impossible_splits(settings, message):
    with pytest.raises(ValueError, match=message):
        author_splits(**settings)


def test_impossible_sizes():
    with pytest.raises(ValueError, match=f"n must be between 1 and {MAX_AUTHORS}, got 0"):
        make_authors(0)
    with pytest.raises(ValueError, match="wrong must be between 1 and 8, got 0"):
        make_authors(1, wrong=0)
