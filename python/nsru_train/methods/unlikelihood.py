"""Bounded unlikelihood."""

import torch
from torch import Tensor

# Nats added to the NLL a token: a memorised answer (p = 1) would have infinite loss and gradient.
FLOOR = 1e-3


def unlikelihood(nll_sum: Tensor, lengths: Tensor) -> Tensor:
    """-log(1 - p(y⁻)) for each sequence, p(y⁻) = exp(-NLL_θ / |y⁻| - 0.001).

    Up to that thousandth p is the answer's probability as evaluation reports it, the geometric mean
    over its tokens. (The plain product is below 0.02 for 40 tokens at 0.9 each: it would stop where
    nearly everything is still known.) Bounded from below by 0, and from above by 6.9, at p = 1.

    Args:
        nll_sum: [B], NLL of the undesired answer, summed over its tokens and EOS.
        lengths: [B], |y⁻|, tokens of the answer with EOS.

    Returns:
        [B], in [0, 6.9].

    Source: after Welleck et al. 2019, arXiv 1908.04319, on answers instead of single tokens.
    """
    return -torch.log(-torch.expm1(-(nll_sum / lengths + FLOOR)))
