"""DPO: preference for the safe target."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nsru_train.losses.batch import FORGET, RETAIN, SAFE, Answers, Batch
from nsru_train.methods.method import Method, mean
from nsru_train.methods.npo import preference


@dataclass(frozen=True)
class DPO(Method):
    """-(2/β) log σ(β [log-ratio of the safe target - log-ratio of the answer to forget]).

    Log-ratios are against the model with adapters off. With refusals as safe targets it is IdkDPO.

    Args:
        w_forget: of the preference.
        w_retain: of the mean NLL of the retain answers' tokens.
        beta: 0.1 as in public code.

    Source: Rafailov et al. 2023, arXiv 2305.18290; Maini et al. 2024, arXiv 2401.06121.
    """

    w_forget: float = 1.0
    w_retain: float = 1.0
    beta: float = 0.1

    ref_nll = (SAFE, FORGET)
    parts = ("forget", "retain")
    ranges = {"beta": "must be positive"}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        margin = log_ratios(batch[SAFE]) - log_ratios(batch[FORGET])
        forget = mean(preference(margin, self.beta))
        retain = mean(batch[RETAIN].nll)
        total = self.w_forget * forget + self.w_retain * retain
        return {"forget": forget, "retain": retain, "total": total}


def log_ratios(answers: Answers) -> Tensor:
    """log p - log p with adapters off, of each answer, [B]."""
    return answers.ref_nll.to(answers.sums.dtype) - answers.sums
