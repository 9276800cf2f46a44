"""GA: gradient ascent on the answers to forget, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nsru_train.losses.batch import Answers
from nsru_train.methods.method import Forget, mean


@dataclass(frozen=True)
class GA(Forget):
    """The mean NLL of the answers to forget goes up.

    Unbounded below: it collapses the model unless it is stopped early.

    Source: Jang et al. 2022, arXiv 2210.01504 ("gradient ascent").
    """

    def forget(self, answers: Answers) -> Tensor:
        return -mean(answers.nll)
