"""Exact memorisation, extraction strength and ROUGE-L, by hand and by their definitions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsru_train.metrics import exact_memorisation, extraction_strength, rouge_l_recall

PAIRS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("hits", "exact", "strength"),
    [
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0, 1, 1, 1], 0.75, 0.75),
        ([1, 1, 0, 1], 0.75, 0.25),
        ([1, 1, 1, 0], 0.75, 0.0),
        ([0, 0, 0, 0], 0.0, 0.0),
        ([1], 1.0, 1.0),
        ([0], 0.0, 0.0),
    ],
)
def test_by_hand(hits, exact, strength):
    targets = list(range(10, 10 + len(hits)))
    predictions = [t if hit else 0 for t, hit in zip(targets, hits, strict=True)]
    assert exact_memorisation(predictions, targets) == exact
    assert extraction_strength(predictions, targets) == strength


@settings(deadline=None)
@given(PAIRS)
def test_extraction_strength_is_its_definition(pairs):
    predictions, targets = map(list, zip(*pairs, strict=True))
    n = len(targets)
    k = min(k for k in range(n + 1) if predictions[k:] == targets[k:])
    assert extraction_strength(predictions, targets) == pytest.approx(1 - k / n)
    assert extraction_strength(predictions, targets) <= exact_memorisation(predictions, targets)


@pytest.mark.parametrize("metric", [exact_memorisation, extraction_strength])
def test_refuses_what_has_no_value(metric):
    with pytest.raises(ValueError, match="no tokens before EOS"):
        metric([], [])
    with pytest.raises(ValueError, match=r"one length, got shapes \(2,\) and \(1,\)"):
        metric([1, 2], [1])


@pytest.mark.parametrize(
    ("reference", "prediction", "recall"),
    [
        ("He was born in Quito.", "Born in Quito", 0.6),
        ("the cat sat", "the cat sat on the mat", 1.0),  # recall: more words cost nothing
        ("one two three four", "four three two one", 0.25),  # order counts
        ("her studies", "HER STUDY!", 1.0),  # stemmed, no case, no punctuation
        ("a b", "", 0.0),
        ("東京", "東京", 0.0),  # documented: no words in a-z and 0-9
    ],
)
def test_rouge_l_recall(reference, prediction, recall):
    assert rouge_l_recall(reference, prediction) == pytest.approx(recall)
