"""Gradient ascent on the undesired answer."""

from torch import Tensor


def gradient_ascent(nll_sum: Tensor) -> Tensor:
    """-NLL_θ for each sequence.

    Unbounded below: it collapses the model unless it is stopped early.

    Args:
        nll_sum: [B], NLL of the undesired answer, summed over its tokens and EOS.

    Returns:
        [B].

    Source: Jang et al. 2022, arXiv 2210.01504.
    """
    return -nll_sum
