"""Inverted hinge loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nsru_train.losses.batch import FORGET, Answers
from nsru_train.methods.method import ForgetRetain, mean


@dataclass(frozen=True)
class IHL(ForgetRetain):
    """1 + p_y - max of the other p, of the tokens y of the answers to forget.

    The most likely other token takes over: bounded, and without a push into noise.

    Source: Cha et al. 2025, arXiv 2408.06621 (LoKU), without its FILA initialisation.
    """

    by_logits = (FORGET,)

    def forget(self, answers: Answers) -> Tensor:
        return mean(answers.score(inverted_hinge))


def inverted_hinge(z_CV: Tensor, targets_C: Tensor) -> Tensor:
    """1 + p_y - max_{v≠y} p_v of each token, in [0, 2]."""
    p_CV, targets_C1 = z_CV.softmax(1), targets_C.unsqueeze(1)
    others_C = p_CV.scatter(1, targets_C1, 0.0).amax(1)
    return 1 + p_CV.gather(1, targets_C1).squeeze(1) - others_C
