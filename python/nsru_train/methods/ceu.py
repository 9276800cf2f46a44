"""Cross-entropy to the model's own distribution without the answer's token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsru_train.losses.batch import FORGET, Answers
from nsru_train.methods.method import Forget, mean


@dataclass(frozen=True)
class CEU(Forget):
    """Cross-entropy to softmax(z without y), held fixed, of the tokens y of the answers to forget.

    No retain term by design.

    Args:
        skip: first tokens of each answer that are left out.

    Source: Yang 2025, arXiv 2503.01224 ("cross-entropy unlearning").
    """

    skip: int = 1

    by_logits = (FORGET,)
    ranges = {"skip": "must not be negative"}

    def forget(self, answers: Answers) -> Tensor:
        return mean(answers.score(others_cross_entropy)[answers.places >= self.skip])


def others_cross_entropy(z_CV: Tensor, targets_C: Tensor) -> Tensor:
    """-Σ_v q_v log p_v of each token, q = softmax of z without the target, without gradient."""
    q_CV = z_CV.detach().scatter(1, targets_C.unsqueeze(1), -torch.inf).softmax(1)
    log_p_CV = torch.where(q_CV == 0, 0.0, z_CV.log_softmax(1))
    return -(q_CV * log_p_CV).sum(1)
