"""NPO without a reference, normalised by length."""

from torch import Tensor
from torch.nn.functional import softplus

BETA = 4.5


def simnpo(nll_sum: Tensor, lengths: Tensor, beta: float = BETA, delta: float = 0.0) -> Tensor:
    """-(2/β) log σ(β (NLL_θ / |y⁻| - δ)) for each sequence.

    Args:
        nll_sum: [B], NLL of the undesired answer, summed over its tokens and EOS.
        lengths: [B], |y⁻|, tokens of the answer with EOS.
        delta: margin δ in nats a token.

    Returns:
        [B], non-negative.

    Source: Fan et al. 2024, arXiv 2410.07163, its margin γ being β δ; usual weight: 0.125.
    """
    return softplus(-beta * (nll_sum / lengths - delta)) * (2 / beta)
