"""Negative preference optimisation."""

from torch import Tensor
from torch.nn.functional import softplus

BETA = 0.1


def npo(nll_sum: Tensor, ref_nll_sum: Tensor, beta: float = BETA) -> Tensor:
    """-(2/β) log σ(β (NLL_θ - NLL_ref)) for each sequence.

    Its gradient in NLL_θ is -2 σ(-β (NLL_θ - NLL_ref)): that of gradient ascent at first, fading
    out as the answer becomes more than 1/β nats less likely than under the reference.

    Args:
        nll_sum: [B], NLL of the undesired answer, summed over its tokens and EOS.
        ref_nll_sum: [B], the same with adapters off.

    Returns:
        [B], non-negative.

    Source: Zhang et al. 2024, arXiv 2404.05868.
    """
    return softplus(-beta * (nll_sum - ref_nll_sum)) * (2 / beta)
