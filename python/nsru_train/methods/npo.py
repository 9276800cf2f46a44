"""Negative preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import softplus

from nsru_train.losses.batch import FORGET, Answers
from nsru_train.methods.method import ForgetRetain, mean


def preference(margin: Tensor, beta: float) -> Tensor:
    """-(2/β) log σ(β · margin), which NPO, SimNPO and DPO take of margins of their own."""
    return softplus(-beta * margin) * (2 / beta)


def npo(nll_sum: Tensor, ref_nll_sum: Tensor, beta: float) -> Tensor:
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
    return preference(nll_sum - ref_nll_sum.to(nll_sum.dtype), beta)


@dataclass(frozen=True)
class NPO(ForgetRetain):
    """`npo` of the answers to forget, beside a retain term.

    Args:
        beta: how soon it fades, 1/nats; 0.1 as in the paper.

    Source: Zhang et al. 2024, arXiv 2404.05868, with both weights 1 as for TOFU.
    """

    beta: float = 0.1

    ref_nll = (FORGET,)
    ranges = {"beta": "must be positive"}

    def forget(self, answers: Answers) -> Tensor:
        return mean(npo(answers.sums, answers.ref_nll, self.beta))
