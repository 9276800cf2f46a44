"""KL: gradient ascent against the divergence of retain answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nsru_train.methods.graddiff import GradDiff


@dataclass(frozen=True)
class KL(GradDiff):
    """Gradient ascent against the KL divergence of retain answers from the base model.

    Source: Maini et al. 2024, arXiv 2401.06121 ("KL minimisation").
    """

    retain: Literal["nll", "kl"] = "kl"
