"""Suppressions: what makes the undesired answer less likely, one file each."""

from __future__ import annotations

from torch import Tensor

from nsru_train.methods.gradient_ascent import gradient_ascent
from nsru_train.methods.npo import BETA as NPO_BETA
from nsru_train.methods.npo import npo
from nsru_train.methods.simnpo import BETA as SIMNPO_BETA
from nsru_train.methods.simnpo import simnpo
from nsru_train.methods.unlikelihood import unlikelihood

__all__ = [
    "SUPPRESSIONS",
    "WEIGHTS",
    "gradient_ascent",
    "npo",
    "simnpo",
    "suppress",
    "unlikelihood",
]

SUPPRESSIONS = ("npo", "simnpo", "unlikelihood", "gradient_ascent")
# λ_sup of each, beside cross-entropies that are means over tokens. SimNPO's is its authors'.
WEIGHTS = {"npo": 0.05, "simnpo": 0.125, "unlikelihood": 1.0, "gradient_ascent": 0.05}


def suppress(
    name: str,
    nll_sum: Tensor,
    lengths: Tensor,
    ref_nll_sum: Tensor,
    *,
    beta: float | None = None,
    delta: float = 0.0,
) -> Tensor:
    """Suppress(y⁻ | q) for each sequence, by one of `SUPPRESSIONS`.

    Args:
        name: "npo", "simnpo", "unlikelihood" or "gradient_ascent".
        nll_sum: [B], NLL of the undesired answer, summed over its tokens and EOS.
        lengths: [B], tokens of that answer, EOS included.
        ref_nll_sum: [B], nll_sum with adapters off; only npo reads it.
        beta: β of npo (default 0.1) and simnpo (default 4.5).
        delta: δ of simnpo.

    Returns:
        [B].

    Raises:
        ValueError: an unknown name, or β not positive.
    """
    if beta is not None and beta <= 0:
        raise ValueError(f"suppress: beta must be positive, got {beta}.")
    match name:
        case "npo":
            return npo(nll_sum, ref_nll_sum, NPO_BETA if beta is None else beta)
        case "simnpo":
            return simnpo(nll_sum, lengths, SIMNPO_BETA if beta is None else beta, delta)
        case "unlikelihood":
            return unlikelihood(nll_sum, lengths)
        case "gradient_ascent":
            return gradient_ascent(nll_sum)
    raise ValueError(f"suppression must be one of {', '.join(SUPPRESSIONS)}, got {name!r}.")
