"""WGA: gradient ascent, tokens weighted by their probability."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsru_train.losses.batch import Answers
from nsru_train.methods.method import ForgetRetain, mean


@dataclass(frozen=True)
class WGA(ForgetRetain):
    """-p^β · NLL of each token of the answers to forget, p its probability, held fixed.

    What is forgotten already, with a small p, is pushed no further.

    Args:
        beta: 1 as in public code.

    Source: Wang et al. 2025, arXiv 2502.19301 ("weighted gradient ascent").
    """

    beta: float = 1.0

    ranges = {"beta": "must not be negative"}

    def forget(self, answers: Answers) -> Tensor:
        weights_T = torch.exp(-self.beta * answers.nll.detach())
        return -mean(weights_T * answers.nll)
