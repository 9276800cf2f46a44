"""SatImp: gradient ascent, tokens weighted by saturation and importance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsru_train.losses.batch import Answers
from nsru_train.methods.method import ForgetRetain, mean


@dataclass(frozen=True)
class SatImp(ForgetRetain):
    """-p^β₁ (1 - p)^β₂ · NLL of each token of the answers to forget, p held fixed.

    Args:
        beta1: of what is known: saturation.
        beta2: of what is not: importance.

    Source: Yang et al. 2025, arXiv 2505.11953. Weights as in public configuration (its README has
    them the other way round: 1 and 0.1).
    """

    w_forget: float = 0.1
    beta1: float = 5.0
    beta2: float = 1.0

    ranges = dict.fromkeys(("beta1", "beta2"), "must not be negative")

    def forget(self, answers: Answers) -> Tensor:
        p_T = torch.exp(-answers.nll.detach())
        return -mean(p_T**self.beta1 * (1 - p_T) ** self.beta2 * answers.nll)
