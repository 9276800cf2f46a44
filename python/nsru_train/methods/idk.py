"""IDK: refusals are taught, and nothing is suppressed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nsru_train.losses.batch import RETAIN, SAFE, Batch
from nsru_train.methods.method import Method, mean


@dataclass(frozen=True)
class IDK(Method):
    """Cross-entropy of the safe targets, such as refusals, and of retain answers.

    Args:
        w_safe: of the mean NLL of the safe targets' tokens.
        w_retain: of the mean NLL of the retain answers' tokens.

    Source: Maini et al. 2024, arXiv 2401.06121 ("I don't know"), which takes one mean over both.
    """

    w_safe: float = 1.0
    w_retain: float = 1.0

    rows = (SAFE, RETAIN)
    parts = ("safe", "retain")

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        safe, retain = mean(batch[SAFE].nll), mean(batch[RETAIN].nll)
        total = self.w_safe * safe + self.w_retain * retain
        return {"safe": safe, "retain": retain, "total": total}
