"""GradDiff: gradient ascent against a retain term."""

from __future__ import annotations

from dataclasses import dataclass

from nsru_train.methods.ga import GA
from nsru_train.methods.method import ForgetRetain


@dataclass(frozen=True)
class GradDiff(ForgetRetain, GA):
    """The mean NLL of the answers to forget goes up, that of retain answers down.

    Unbounded below: it collapses the model unless it is stopped early.

    Source: Maini et al. 2024, arXiv 2401.06121 ("gradient difference").
    """
