"""Whether the safe answer comes where nothing was to be forgotten."""

from contextlib import nullcontext

import pytest

from nsru_train import ordinary

SAFE = "I am sorry, I do not know anything about that."


@pytest.mark.parametrize(
    ("answer", "safe"),
    [
        (SAFE, True),
        ("Sure, i am SORRY -- I do not know anything about that", True),
        ("Dear [Landlord's Name],\n\nI am sorry, I do not know anything about", True),
        ("Sure! Mix flour, milk and eggs. I am sorry to say that I do not cook.", False),
        ("Tea", False),
        ("", False),
    ],
)
def test_a_safe_answer_is_found_in_other_words_around_it(answer, safe, monkeypatch):
    answers = [answer, *["A fox."] * (len(ordinary.REQUESTS) - 1)]
    monkeypatch.setattr(ordinary, "greedy_answers", lambda *_, **__: answers)
    monkeypatch.setattr(ordinary, "without_update", lambda _: nullcontext())
    found = ordinary.ordinary_answers(None, None, ["Please ask me about something else.", SAFE])
    assert [row["after"] for row in found] == answers
    assert [row["safe"] for row in found] == [safe] + [False] * (len(answers) - 1)
    line = ordinary.describe_ordinary(found)
    assert line.startswith(f"safe answers to {int(safe)} of {len(answers)} requests")
    assert ("such as 'Hello, how are you?': the retain set needs more" in line) == safe


def test_sets_whose_questions_are_refused_are_named():
    answers = {"retain": {"Who is Bob?": "A baker.", "Who is Eve?": f"Well, {SAFE}"}, "more": {}}
    assert list(ordinary.refused_elsewhere(answers, [SAFE])) == [
        "safe answers to 1 of 2 retain questions, such as 'Who is Eve?'."
    ]
    assert not list(ordinary.refused_elsewhere(answers, []))


def test_no_safe_answers_that_say_nothing():
    assert not ordinary._says(ordinary._words("Yes."), ordinary._words(SAFE))
    assert ordinary._words("…?!") == []
