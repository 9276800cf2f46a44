"""MIN-K%, the attack's AUC and PrivLeak: values by hand, signs, and refusals."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsru_train.metrics import membership_auc, min_k, privleak

SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=8)


def test_min_k_takes_the_least_likely_tokens():
    nll = [0.1, 5.0, 0.2, 3.0, 0.3]
    assert min_k(nll, k=0.4) == pytest.approx(-(5.0 + 3.0) / 2)
    assert min_k(nll, k=0.59) == min_k(nll, k=0.4)  # rounds down
    assert min_k(nll, k=0.01) == -5.0  # at least one token
    assert min_k(nll, k=1.0) == pytest.approx(-sum(nll) / 5)
    assert min_k(nll) == min_k(nll, k=0.4)


@settings(deadline=None)
@given(SCORES, SCORES)
def test_auc_is_the_share_of_ordered_pairs(member, nonmember):
    pairs = [(a > b) + 0.5 * (a == b) for a in member for b in nonmember]
    assert membership_auc(member, nonmember) == pytest.approx(sum(pairs) / len(pairs))
    assert membership_auc(nonmember, member) == pytest.approx(1 - sum(pairs) / len(pairs))


def test_privleak_signs_follow_muse():
    assert privleak(1.0) == -100.0  # every forget question still looks trained on
    assert privleak(0.5) == 0.0
    assert privleak(0.0) == 100.0
    assert privleak(0.8, reference_auc=0.6) == pytest.approx(-50.0)
    assert privleak(0.6, reference_auc=0.6) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: min_k([]), "token_nll must be a non-empty list"),
        (lambda: min_k([1.0, math.nan]), r"token_nll\[1\] is nan"),
        (lambda: min_k([1.0], k=0), r"k must be in \(0, 1\], got 0"),
        (lambda: min_k([1.0], k=40), "got 40"),
        (lambda: membership_auc([], [1.0]), "member must be a non-empty"),
        (lambda: membership_auc([1.0], [math.inf]), r"nonmember\[0\] is inf"),
        (lambda: privleak(1.1), "auc must be in"),
        (lambda: privleak(0.5, reference_auc=1.0), r"reference_auc must be in \[0, 1\), got 1.0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
