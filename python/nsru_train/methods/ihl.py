"""Inverted hinge loss, and the low-rank start that LoKU gives it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nsru_train.losses.batch import FORGET, Answers
from nsru_train.methods.fila import Batches, start_with_fila
from nsru_train.methods.method import ForgetRetain, mean


@dataclass(frozen=True)
class IHL(ForgetRetain):
    """1 + p_y - max of the other p, of the tokens y of the answers to forget.

    The most likely other token takes over: bounded, and without a push into noise.

    Args:
        fila: start from the part of each weight that matters most for what is forgotten; two more
            passes over all questions, a gradient of all adapted weights in memory, and adapters of
            twice the rank.

    Source: Cha et al. 2025, arXiv 2408.06621 (LoKU).
    """

    fila: bool = False

    by_logits = (FORGET,)

    @property
    def starts_elsewhere(self) -> bool:
        return self.fila

    def begin(self, model: nn.Module, forget: Batches, retain: Batches) -> None:
        start_with_fila(model, forget, retain)

    def forget(self, answers: Answers) -> Tensor:
        return mean(answers.score(inverted_hinge))


def inverted_hinge(z_CV: Tensor, targets_C: Tensor) -> Tensor:
    """1 + p_y - max_{v≠y} p_v of each token, in [0, 2]."""
    p_CV, targets_C1 = z_CV.softmax(1), targets_C.unsqueeze(1)
    others_C = p_CV.scatter(1, targets_C1, 0.0).amax(1)
    return 1 + p_CV.gather(1, targets_C1).squeeze(1) - others_C
