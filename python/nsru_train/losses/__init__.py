"""Losses of unlearning: per-token NLL without full logits, and the NSRU objective built on it."""

from nsru_train.losses.nll import answer_nll, answer_states, token_kl, token_nll
from nsru_train.losses.objective import FORGET, RETAIN, SAFE, Objective, nsru_loss

__all__ = [
    "FORGET",
    "RETAIN",
    "SAFE",
    "Objective",
    "answer_nll",
    "answer_states",
    "nsru_loss",
    "token_kl",
    "token_nll",
]
