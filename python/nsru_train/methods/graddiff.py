"""Gradient ascent on the answers to forget: alone, or against a retain term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from nsru_train.losses.batch import Answers
from nsru_train.methods.method import Forget, ForgetRetain, mean


@dataclass(frozen=True)
class GA(Forget):
    """The mean NLL of the answers to forget goes up.

    Unbounded below: it collapses the model unless it is stopped early.

    Source: Jang et al. 2022, arXiv 2210.01504 ("gradient ascent").
    """

    def forget(self, answers: Answers) -> Tensor:
        return -mean(answers.nll)


@dataclass(frozen=True)
class GradDiff(ForgetRetain, GA):
    """The mean NLL of the answers to forget goes up, that of retain answers down.

    Unbounded below: it collapses the model unless it is stopped early.

    Source: Maini et al. 2024, arXiv 2401.06121 ("gradient difference").
    """


@dataclass(frozen=True)
class KL(GradDiff):
    """Gradient ascent against the KL divergence of retain answers from the base model.

    Source: Maini et al. 2024, arXiv 2401.06121 ("KL minimisation").
    """

    retain: Literal["nll", "kl"] = "kl"
