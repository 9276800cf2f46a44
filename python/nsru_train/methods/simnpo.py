"""NPO without a reference, normalised by length."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nsru_train.losses.batch import Answers
from nsru_train.methods.method import ForgetRetain, mean
from nsru_train.methods.npo import preference


def simnpo(nll_sum: Tensor, lengths: Tensor, beta: float, delta: float = 0.0) -> Tensor:
    """-(2/β) log σ(β (NLL_θ / |y⁻| - δ)) for each sequence.

    Args:
        nll_sum: [B], NLL of the undesired answer, summed over its tokens and EOS.
        lengths: [B], |y⁻|, tokens of the answer with EOS.
        delta: margin δ in nats a token.

    Returns:
        [B], non-negative.

    Source: Fan et al. 2024, arXiv 2410.07163, its margin γ being β δ; usual weight: 0.125.
    """
    return preference(nll_sum / lengths - delta, beta)


@dataclass(frozen=True)
class SimNPO(ForgetRetain):
    """`simnpo` of the answers to forget, beside a retain term.

    Args:
        beta: sharpness; 4.5 as its authors have it for TOFU's forget10.
        delta: margin in nats a token.

    Source: Fan et al. 2024, arXiv 2410.07163; w_forget 0.125 for forget10 (0.1375 and β 2.5 for
    forget05).
    """

    w_forget: float = 0.125
    beta: float = 4.5
    delta: float = 0.0

    ranges = {"beta": "must be positive", "delta": "must be a finite number"}

    def forget(self, answers: Answers) -> Tensor:
        return mean(simnpo(answers.sums, answers.lengths, self.beta, self.delta))
