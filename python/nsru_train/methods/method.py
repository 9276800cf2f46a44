"""What a method of unlearning says of itself, and the shape that most of them share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from torch import Tensor, nn

from nsru_kernels.checks import check_settings
from nsru_train.losses.batch import FORGET, RETAIN, SAFE, Answers, Batch


@dataclass(frozen=True)
class Method:
    """One way to unlearn. A subclass is a frozen dataclass: its fields are its settings.

    Class attributes:
        rows: kinds of rows that an item of a batch holds, out of SAFE (the question with its safe
            target), FORGET (with the answer to forget) and RETAIN (questions to keep).
        ref_nll: kinds whose NLL with adapters off the loss reads.
        by_logits: kinds whose NLL it does not read.
        alternatives: whether SAFE rows hold a record's alternatives instead, one after the other by
            epoch; the safe target where it has none.
        keeps_best: whether the adapters of the evaluation with the highest `score` are kept.
        parts: names of the loss's parts, as metrics.jsonl has them, without the total.
        ranges: of settings; a weight, one that begins with w_, is never negative.

    A method may also say `prepare`, `targets`, `applied` and `score`.
    """

    rows: ClassVar[tuple[int, ...]] = (SAFE, FORGET, RETAIN)
    ref_nll: ClassVar[Collection[int]] = ()
    by_logits: ClassVar[Collection[int]] = ()
    alternatives: ClassVar[bool] = False
    keeps_best: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]]
    ranges: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        weights = {field.name for field in fields(self) if field.name.startswith("w_")}
        ranges = {**dict.fromkeys(weights, "must not be negative"), **self.ranges}
        check_settings("objective", self, **ranges)

    @property
    def applied(self) -> float:
        """Factor on the trained update where it is evaluated, saved and used."""
        return 1.0

    def check_weights(self) -> None:
        """Raise ValueError where all weights are 0: nothing would be trained."""
        weights = [getattr(self, f.name) for f in fields(self) if f.name.startswith("w_")]
        if weights and not any(weight is None or weight > 0 for weight in weights):
            raise ValueError(
                "objective: all weights are 0, which trains nothing; give one above 0."
            )

    def prepare(self, model: nn.Module) -> Method:
        """This method with the settings that depend on the model, before anything is swapped."""
        return self

    def targets(self, model: nn.Module) -> Sequence[str] | None:
        """The linears that are adapted, as ``targets`` of `swap_linears`; None: the user's."""
        return None

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The parts, unweighted, and "total", which is differentiated; scalars.

        Args:
            batch: the `Answers` of each kind in ``rows``.
        """
        raise NotImplementedError

    def score(self, start: Mapping[str, float], now: Mapping[str, float]) -> float | None:
        """How good the adapters of an evaluation are; None where they may not be kept.

        Args:
            start: results before the first step, forget_prob and retain_prob among them.
            now: results of this evaluation.
        """
        raise NotImplementedError

    def refuse(self, name: str, expected: str) -> None:
        """Raise ValueError for the setting ``name``."""
        raise ValueError(f"objective.{name} {expected}, got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Forget(Method):
    """w_forget · forget, and no other term.

    Args:
        w_forget: weight of the forget term.
    """

    w_forget: float = 1.0

    rows: ClassVar[tuple[int, ...]] = (FORGET,)
    parts: ClassVar[tuple[str, ...]] = ("forget",)

    def forget(self, answers: Answers) -> Tensor:
        """The forget term, a scalar."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        forget = self.forget(batch[FORGET])
        return {"forget": forget, "total": self.w_forget * forget}


@dataclass(frozen=True)
class ForgetRetain(Forget):
    """w_forget · forget + w_retain · retain: the shape of most methods.

    Retain is the mean NLL of the retain answers' tokens, or their mean KL from the model with
    adapters off. Means are over all tokens of a batch, as in the methods' public code.

    Args:
        w_retain: weight of the retain term.
        retain: "nll", or "kl", which costs one more forward of the retain rows.
    """

    w_retain: float = 1.0
    retain: Literal["nll", "kl"] = "nll"

    rows = (FORGET, RETAIN)
    parts = ("forget", "retain")

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        parts = super().loss(batch)
        kept = batch[RETAIN]
        parts["retain"] = mean(kept.nll if self.retain == "nll" else kept.kl())
        parts["total"] = parts["total"] + self.w_retain * parts["retain"]
        return parts


def mean(values: Tensor) -> Tensor:
    """Mean; 0 of nothing."""
    return values.sum() / max(1, values.numel())
