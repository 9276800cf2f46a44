"""Losses per token without full logits, and the rows of a batch that they are taken of."""

from nsru_train.losses.batch import FORGET, RETAIN, SAFE, Answers, ScoredBatch
from nsru_train.losses.hidden import decoder_layers, layer_states
from nsru_train.losses.nll import answer_nll, answer_states, token_kl, token_nll, token_score

__all__ = [
    "FORGET",
    "RETAIN",
    "SAFE",
    "Answers",
    "ScoredBatch",
    "answer_nll",
    "answer_states",
    "decoder_layers",
    "layer_states",
    "token_kl",
    "token_nll",
    "token_score",
]
