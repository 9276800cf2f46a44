"""The objective: weighting, means and sums, against a loop over sequences."""

import dataclasses

import pytest
import torch

from nsru_train.losses import FORGET, RETAIN, SAFE, Answers
from nsru_train.methods import Objective
from nsru_train.methods.npo import npo
from nsru_train.methods.nsru import WEIGHTS

KIND = torch.tensor([SAFE, FORGET, RETAIN, RETAIN, SAFE, FORGET, RETAIN])
LENGTHS = [3, 5, 2, 4, 1, 2, 6]
ROWS = torch.repeat_interleave(torch.arange(7), torch.tensor(LENGTHS))
REFERENCE = torch.tensor([0.0, 2.0, 0, 0, 0, 1.0, 0])


def tokens():
    return torch.rand(len(ROWS), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Tokens:
    """Tokens whose NLL and KL are given."""

    def __init__(self, nll, kl):
        self._nll, self._kl = nll, kl

    def nll(self):
        return self._nll

    def kl(self, base):
        return self._kl


def batch(nll, kind=KIND, kl=None):
    def answers(wanted):
        chosen = kind == wanted
        keep = chosen[ROWS]
        rows = (chosen.cumsum(0) - 1)[ROWS[keep]]
        tokens = Tokens(nll[keep], kl)
        return Answers(
            lambda: tokens, rows, int(chosen.sum()), REFERENCE[chosen], base=lambda: None
        )

    return {wanted: answers(wanted) for wanted in (SAFE, FORGET, RETAIN)}


def test_terms_equal_a_loop_over_sequences():
    nll, kl = tokens().requires_grad_(), tokens()[KIND[ROWS] == RETAIN] / 7
    objective = Objective(
        w_safe=2.0, w_suppress=0.5, w_retain=3.0, w_kl=0.25, suppression="npo", beta=0.3
    )
    parts = objective.loss(batch(nll, kl=kl))

    per_row = [nll[row == ROWS] for row in range(7)]
    safe = (per_row[0].mean() + per_row[4].mean()) / 2
    sums = torch.stack([per_row[1].sum(), per_row[5].sum()])
    suppressed = npo(sums, REFERENCE[[1, 5]], beta=0.3).mean()
    retain = (per_row[2].mean() + per_row[3].mean() + per_row[6].mean()) / 3
    divergence = (kl[:2].mean() + kl[2:6].mean() + kl[6:].mean()) / 3
    expected = 2.0 * safe + 0.5 * suppressed + 3.0 * (retain + 0.25 * divergence)

    for name, value in {
        "safe": safe,
        "suppress": suppressed,
        "retain": retain,
        "kl": divergence,
        "total": expected,
    }.items():
        torch.testing.assert_close(parts[name], value)
    mine, theirs = (
        torch.autograd.grad(x, nll, retain_graph=True)[0] for x in (parts["total"], expected)
    )
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("weight", "kind"), [("w_safe", SAFE), ("w_suppress", FORGET), ("w_retain", RETAIN)]
)
def test_a_zero_weight_leaves_its_rows_without_gradient(weight, kind):
    nll = tokens().requires_grad_()
    objective = dataclasses.replace(Objective(), **{weight: 0.0})
    objective.loss(batch(nll))["total"].backward()
    assert ((nll.grad == 0) == (KIND[ROWS] == kind)).all()


@pytest.mark.parametrize(("suppression", "weight"), WEIGHTS.items())
def test_a_suppression_has_a_weight_of_its_own(suppression, weight):
    def loss(**options):
        return Objective(suppression=suppression, **options).loss(batch(tokens()))

    parts = loss()
    assert parts["total"] == parts["safe"] + weight * parts["suppress"] + parts["retain"]
    parts = loss(w_suppress=2.0)
    assert parts["total"] == parts["safe"] + 2 * parts["suppress"] + parts["retain"]


def test_absent_kinds_count_as_zero():
    only_safe = torch.full_like(KIND, SAFE)
    parts = Objective().loss(batch(tokens(), only_safe))
    assert parts["suppress"] == parts["retain"] == 0
    assert torch.isfinite(parts["total"])


def test_bad_arguments():
    with pytest.raises(ValueError, match="w_retain must not be negative, got -1"):
        Objective(w_retain=-1)
    with pytest.raises(ValueError, match="suppression must be one of npo"):
        Objective(suppression="nope")
    with pytest.raises(ValueError, match="beta must be positive"):
        Objective(beta=0.0)
    with pytest.raises(ValueError, match="beta is read by npo and simnpo only, got 2"):
        Objective(beta=2.0)
    with pytest.raises(ValueError, match=r"delta is read by simnpo only, got 1\.0 for npo"):
        Objective(suppression="npo", delta=1.0)
