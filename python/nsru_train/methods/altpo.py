"""AltPO: DPO towards other plausible answers."""

from __future__ import annotations

from dataclasses import dataclass

from nsru_train.methods.dpo import DPO


@dataclass(frozen=True)
class AltPO(DPO):
    """DPO towards the plausible other answers that records bring as ``alternatives``.

    Source: Mekala et al. 2024, arXiv 2409.13474, where the model itself writes five of them.
    """

    alternatives = True
