"""Task arithmetic: learn the answers to forget once more, then go the other way."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nsru_train.losses.batch import FORGET, Batch
from nsru_train.methods.method import Method, mean


@dataclass(frozen=True)
class TaskVector(Method):
    """The mean NLL of the answers to forget goes down; the update is applied at a negative scale.

    Args:
        scale: α > 0, of the update that is taken away.

    Source: Ilharco et al. 2023, arXiv 2212.04089; α 5 as in MUSE. Adapters instead of whole
    matrices are ours.
    """

    scale: float = 5.0

    rows = (FORGET,)
    parts = ("learn",)
    ranges = {"scale": "must be positive"}

    @property
    def applied(self) -> float:
        return -self.scale

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        learn = mean(batch[FORGET].nll)
        return {"learn": learn, "total": learn}
