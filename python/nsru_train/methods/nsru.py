"""NSRU: safe targets in, undesired answers out, retained answers kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nsru_train.data.records import QA
from nsru_train.losses.batch import FORGET, RETAIN, SAFE, Answers, Batch
from nsru_train.methods.method import Method, mean
from nsru_train.methods.npo import NPO, npo
from nsru_train.methods.simnpo import SimNPO, simnpo
from nsru_train.methods.unlikelihood import unlikelihood

# λ_sup of each, beside cross-entropies that are means over tokens. SimNPO's is its authors'.
WEIGHTS = {"npo": 0.05, "simnpo": 0.125, "unlikelihood": 1.0, "gradient_ascent": 0.05}
SUPPRESSIONS = tuple(WEIGHTS)


@dataclass(frozen=True)
class Objective(Method):
    """λ_safe · CE(y⁺) + λ_sup · Suppress(y⁻) + λ_ret · [CE(y_r) + λ_kl · KL(base ‖ model)].

    CE and KL are means over a sequence's tokens, then over sequences, so that long answers do not
    outweigh short ones. Suppress sees the *sum* of NLL over the undesired answer's tokens, EOS
    included, and is averaged over sequences. A term without rows in the batch is zero.

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

    ref_nll = (FORGET,)
    parts = ("safe", "suppress", "retain", "kl")
    ranges = {"beta": "must be positive", "delta": "must be a finite number"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.suppression not in SUPPRESSIONS:
            self.refuse("suppression", f"must be one of {', '.join(SUPPRESSIONS)}")
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

    def lacks(self, forget: Sequence[QA]) -> str | None:
        return None  # built-in refusals are its default

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        retained = batch[RETAIN]
        parts = {
            "safe": mean(batch[SAFE].means),
            "suppress": mean(self.suppress(batch[FORGET])),
            "retain": mean(retained.means),
            "kl": retained.nll.new_zeros(()),
        }
        if self.w_kl > 0:
            parts["kl"] = mean(retained.sum(retained.kl()) / retained.lengths.clamp(min=1))
        total = (
            self.w_safe * parts["safe"]
            + self.suppress_weight * parts["suppress"]
            + self.w_retain * (parts["retain"] + self.w_kl * parts["kl"])
        )
        return {**parts, "total": total}

    def suppress(self, answers: Answers) -> Tensor:
        """Suppress(y⁻ | q) of each answer, [B]."""
        match self.suppression:
            case "npo":
                return npo(answers.sums, answers.ref_nll, self.beta or NPO.beta)
            case "simnpo":
                beta = self.beta or SimNPO.beta
                return simnpo(answers.sums, answers.lengths, beta, self.delta)
            case "unlikelihood":
                return unlikelihood(answers.sums, answers.lengths)
        return -answers.sums
