"""LUNE: other answers are taught, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nsru_train.losses.batch import SAFE, Batch
from nsru_train.methods.method import Method, mean


@dataclass(frozen=True)
class LUNE(Method):
    """Cross-entropy of a record's alternatives ("negatives") alone: no suppression, no retain term.

    The evaluation that forgets most is kept, of those at which retain answers lost at most
    ``guard`` of their mean probability. The paper guards the accuracy on neighbouring questions;
    their probability is our reading. So is that the other answers may be safe targets.

    Args:
        guard: loss of mean probability, 0 to 1.

    Source: arXiv 2512.07375; 0.005 from a replication of its appendix.
    """

    guard: float = 0.005

    rows = (SAFE,)
    alternatives = True
    parts = ("safe",)
    keeps_best = True
    ranges = {"guard": "must be a share from 0 to 1"}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        safe = mean(batch[SAFE].nll)
        return {"safe": safe, "total": safe}

    def score(self, start: Mapping[str, float], now: Mapping[str, float]) -> float | None:
        kept = now["retain_prob"] >= start["retain_prob"] - self.guard
        return -now["forget_prob"] if kept else None
