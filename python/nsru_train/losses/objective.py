"""The NSRU objective: safe targets in, undesired answers out, retained answers kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsru_kernels.checks import check_settings
from nsru_train.methods import SUPPRESSIONS, WEIGHTS, suppress

SAFE, FORGET, RETAIN = 0, 1, 2


@dataclass(frozen=True)
class Objective:
    """Weights and suppression of `nsru_loss`.

    Args:
        w_safe: λ_safe, of the cross-entropy of safe targets.
        w_suppress: λ_sup. None puts the suppression on one footing with cross-entropy, a mean over
            tokens: 1 for unlikelihood, 0.05 for npo and gradient_ascent, which are sums over some
            20 tokens.
        w_retain: λ_ret, of the cross-entropy of retain answers.
        w_kl: λ_kl, inside the retain term; above 0 a step needs one more forward, of retain rows.
        suppression: "unlikelihood", "npo", "simnpo" or "gradient_ascent".
        beta: of npo and simnpo; None is the suppression's own default.
        delta: margin of simnpo, in nats a token.

    Raises:
        ValueError: a negative weight, an unknown suppression, or a beta or delta that it does not
            read.
    """

    w_safe: float = 1.0
    w_suppress: float | None = None
    w_retain: float = 1.0
    w_kl: float = 0.0
    suppression: str = "unlikelihood"
    beta: float | None = None
    delta: float = 0.0

    def __post_init__(self) -> None:
        weights = dict.fromkeys(
            ("w_safe", "w_suppress", "w_retain", "w_kl"), "must not be negative"
        )
        check_settings(
            "objective", self, **weights, beta="must be positive", delta="must be a finite number"
        )
        if self.suppression not in SUPPRESSIONS:
            raise ValueError(
                f"Objective: suppression must be one of {', '.join(SUPPRESSIONS)}, "
                f"got {self.suppression!r}."
            )
        for name, default, readers in (
            ("beta", None, ("npo", "simnpo")),
            ("delta", 0, ("simnpo",)),
        ):
            value = getattr(self, name)
            if value != default and self.suppression not in readers:
                raise ValueError(
                    f"Objective: {name} is read by {' and '.join(readers)} only, got {value} for "
                    f"{self.suppression}; leave it out, or choose another suppression."
                )

    @property
    def suppress_weight(self) -> float:
        """λ_sup in use."""
        return WEIGHTS[self.suppression] if self.w_suppress is None else self.w_suppress


def nsru_loss(
    nll: Tensor,
    rows: Tensor,
    kind: Tensor,
    ref_nll: Tensor,
    objective: Objective,
    *,
    kl: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """λ_safe · CE(y⁺) + λ_sup · Suppress(y⁻) + λ_ret · [CE(y_r) + λ_kl · KL(base ‖ model)].

    CE and KL are means over a sequence's tokens, then over sequences, so that long answers do not
    outweigh short ones. Suppress sees the *sum* of NLL over the undesired answer's tokens, EOS
    included, and is averaged over sequences. A term without rows in the batch is zero.

    Args:
        nll: [T] of every answer token in the batch.
        rows: [T] long, the batch row of each token.
        kind: [B] long, SAFE (0), FORGET (1) or RETAIN (2).
        ref_nll: [B], summed NLL with adapters off; read on forget rows.
        objective: weights and suppression.
        kl: [T_r] of the retain rows' tokens in the order of `rows`; needed where w_kl > 0.

    Returns:
        The loss and its parts, detached and unweighted: safe, suppress, retain, kl, and total.

    Raises:
        ValueError: w_kl > 0 without kl.
    """
    sums_B = _sum_rows(nll, rows, len(kind))
    lengths_B = _sum_rows(torch.ones_like(nll), rows, len(kind))
    means_B = sums_B / lengths_B.clamp(min=1)
    forget = kind == FORGET
    suppressed = suppress(
        objective.suppression,
        sums_B[forget],
        lengths_B[forget],
        ref_nll[forget].to(sums_B.dtype),
        beta=objective.beta,
        delta=objective.delta,
    )
    parts = {
        "safe": _mean(means_B[kind == SAFE]),
        "suppress": _mean(suppressed),
        "retain": _mean(means_B[kind == RETAIN]),
        "kl": nll.new_zeros(()),
    }
    if objective.w_kl > 0:
        if kl is None:
            raise ValueError(f"nsru_loss: w_kl = {objective.w_kl} needs kl [T_r], got None.")
        retained = kind == RETAIN
        kl_B = _sum_rows(kl, rows[retained[rows]], len(kind)) / lengths_B.clamp(min=1)
        parts["kl"] = _mean(kl_B[retained])
    total = (
        objective.w_safe * parts["safe"]
        + objective.suppress_weight * parts["suppress"]
        + objective.w_retain * (parts["retain"] + objective.w_kl * parts["kl"])
    )
    parts["total"] = total
    return total, {name: value.detach() for name, value in parts.items()}


def _sum_rows(values_T: Tensor, rows_T: Tensor, batch: int) -> Tensor:
    """Sum of each row's tokens, [B]. Not index_add_, whose order of addition varies on a GPU."""
    member_BT = rows_T == torch.arange(batch, device=rows_T.device).unsqueeze(1)
    return torch.where(member_BT, values_T, 0).sum(1)


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, values.numel())
