"""Primal-dual unlearning: forget as much as a bound on the retain loss allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nsru_train.losses.batch import FORGET, RETAIN, Answers, Batch
from nsru_train.methods.method import Compat, Method, mean


@dataclass(frozen=True)
class PDU(Method):
    """w_forget · (max z - mean z)² + λ · (NLL of retain answers - bound), λ the bound's multiplier.

    Logits z of the tokens of the answers to forget become flat. After the warm-up λ changes by
    dual_lr · (NLL - bound) with each step, never below 0. NLL is a mean over the tokens of a step;
    public code changes λ with every micro-batch and on each process by itself.

    Args:
        w_forget: of the first term.
        multiplier: λ at the start.
        dual_lr: step size of λ.
        bound: of the retain answers' NLL, nats a token; (1 + slack) times that of the base model is
            the authors' rule of thumb.
        dual_warmup: epochs of the questions to forget in which λ stays as it is.
        compat: "open-unlearning" takes the logits one position later, as public code does.

    Source: Entesari et al. 2025, arXiv 2506.05314; values of its TOFU configuration.
    """

    w_forget: float = 1.0
    multiplier: float = 100.0
    dual_lr: float = 5.0
    bound: float = 0.3
    dual_warmup: int = 5
    compat: Compat | None = None

    rows = (FORGET, RETAIN)
    by_logits = (FORGET,)
    parts = ("forget", "retain", "multiplier")
    ranges: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("multiplier", "dual_lr", "bound", "dual_warmup"), "must not be negative"
    )

    def start(self) -> dict[str, float]:
        return {"multiplier": self.multiplier}

    def after_step(
        self, state: Mapping[str, float], epoch: float, parts: Mapping[str, float]
    ) -> dict[str, float]:
        if epoch < self.dual_warmup:
            return dict(state)
        change = self.dual_lr * (parts["retain"] - self.bound)
        return {"multiplier": max(0.0, state["multiplier"] + change)}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        forget, retain = self.forget(batch[FORGET]), mean(batch[RETAIN].nll)
        multiplier = torch.full_like(retain, batch.state["multiplier"])
        total = self.w_forget * forget + multiplier * (retain - self.bound)
        return {"forget": forget, "retain": retain, "multiplier": multiplier, "total": total}

    def forget(self, answers: Answers) -> Tensor:
        """Mean of (max z - mean z)² over tokens, a scalar."""
        if self.compat is None:
            return mean(answers.score(squared_margin))
        every = answers.everywhere()
        return mean(every.states.select(every.labelled).score(squared_margin))


def squared_margin(z_CV: Tensor, targets_C: Tensor) -> Tensor:
    """(max z - mean z)² of each token; masked entries of the vocabulary do not count."""
    seen_CV = z_CV > -torch.inf
    mean_C = torch.where(seen_CV, z_CV, 0.0).sum(1) / seen_CV.sum(1)
    return (z_CV.amax(1) - mean_C).square()
