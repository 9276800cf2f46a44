"""MIN-K%, the attack's AUC and PrivLeak: values by hand, signs, and refusals."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsru_train.metrics import membership_auc, min_k, min_k_plus_plus, privleak

SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=8)


def test_min_k_takes_the_least_likely_tokens():
    nll = [0.1, 5.0, 0.2, 3.0, 0.3]
    assert min_k(nll, k=0.4) == pytest.approx(-(5.0 + 3.0) / 2)
    assert min_k(nll, k=0.59) == min_k(nll, k=0.4)  # rounds down
    assert min_k(nll, k=0.01) == -5.0  # at least one token
    assert min_k(nll, k=1.0) == pytest.approx(-sum(nll) / 5)
    assert min_k(nll) == min_k(nll, k=0.4)


@pytest.mark.parametrize("row", [0, 1])
def test_min_k_and_min_k_plus_plus_of_public_code(shared_data, row):
    path = shared_data / "golden_losses.json"
    if not path.is_file():
        pytest.skip(f"the values are not there: {path}")
    wanted = json.loads(path.read_text())["metrics"][f"row{row}"]
    t, v = np.arange(7)[:, None], np.arange(11)
    z = 2 * np.sin(1 + 7 * row + 3 * t + 2 * v + 0.5 * v**2)
    log_probs = z - np.log(np.exp(z).sum(1, keepdims=True))
    ids = (3 * row + 5 * np.arange(7) + 1) % 11
    places = np.arange(2, 6 - row)  # the answer's, but for the last token, which stands for EOS
    assert ids[places].tolist() == wanted["labels"]
    log_p = log_probs[places - 1, ids[places]]
    assert -min_k(-log_p) == pytest.approx(wanted["min_k_04"], rel=1e-12)
    found = min_k_plus_plus(log_probs[places - 1], ids[places])
    assert -found == pytest.approx(wanted["min_k_pp_04"], rel=1e-12)


def test_min_k_plus_plus_of_a_certain_token_is_finite():
    log_probs = np.array([[0.0, -np.inf], [-np.inf, 0.0]])
    assert min_k_plus_plus(log_probs, [0, 1]) == 0.0


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
