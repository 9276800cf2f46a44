"""Self-distillation from logits in which the answer's token is pushed down."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from nsru_train.losses.batch import FORGET, Answers
from nsru_train.methods.method import ForgetRetain, mean


@dataclass(frozen=True)
class UNDIAL(ForgetRetain):
    """Cross-entropy to softmax(z_base - β · 1_y) of the tokens y of the answers to forget.

    Costs one more forward of the forget rows, adapters off.

    Args:
        beta: how far the base model's logit of y is lowered.
        compat: "open-unlearning" takes all positions, prompt and padding included, and lowers the
            logit V - 100 where there is no answer, V the size of the vocabulary; a third forward.

    Source: Dong et al. 2024, arXiv 2402.10052; β as in public code, w_retain 1 as in its tuning
    (its default is 0).
    """

    beta: float = 10.0

    by_logits = (FORGET,)
    ranges = {"beta": "must not be negative"}
    read_by_forget = True

    def forget(self, answers: Answers) -> Tensor:
        def cross_entropy(z_CV: Tensor, targets_C: Tensor, base_CV: Tensor) -> Tensor:
            size = base_CV.shape[1]
            wanted_CV = base_CV - self.beta * one_hot(targets_C.remainder(size), size)
            log_p_CV = z_CV.log_softmax(1)
            seen = torch.where(wanted_CV == -torch.inf, 0.0, log_p_CV)
            return -(wanted_CV.softmax(1) * seen).sum(1)

        if self.compat is None:
            return mean(answers.score(cross_entropy, with_base=True))
        return mean(answers.everywhere().score(cross_entropy))
