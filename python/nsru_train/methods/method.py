"""The interface of a method of unlearning, and the shape that most of them share."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from nsru_kernels.checks import check_settings
from nsru_kernels.hf.peft_format import save_lora_adapter
from nsru_kernels.nn.swap import SwapReport
from nsru_train.data.records import QA
from nsru_train.losses.batch import FORGET, RETAIN, SAFE, Answers, Batch
from nsru_train.losses.hidden import decoder_layers

if TYPE_CHECKING:
    from nsru_train.guard import AttachedGuard

logger = logging.getLogger(__name__)

# Whose way of computing a loss is taken, where public code deviates from its paper.
Compat = Literal["open-unlearning"]


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
        trains: whether adapters are trained; a method that does not says `make_guard`, no `loss`.
        ranges: of settings; a weight, one that begins with w_, is never negative.

    What needs no preparation the loss takes as it goes, from the `Answers` of a kind: logits of the
    base model by `kl` and `base_score`, states of a layer, with adapters or without, by `hidden`.

    A method may also say `prepare`, `targets`, `starts_elsewhere` and `begin`, `start` and
    `after_step`, `applied` and `score`; with phases `at` and `rate`; with adapters of its own form
    `adapt`, `domains` and `save`; and `lacks` and `check_records` of what it reads of records.
    """

    rows: ClassVar[tuple[int, ...]] = (SAFE, FORGET, RETAIN)
    ref_nll: ClassVar[Collection[int]] = ()
    by_logits: ClassVar[Collection[int]] = ()
    alternatives: ClassVar[bool] = False
    keeps_best: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]]
    ranges: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        weights = {field.name for field in fields(self) if field.name.startswith("w_")}
        ranges = {**dict.fromkeys(weights, "must not be negative"), **self.ranges}
        check_settings("objective", self, **ranges)
        hints = get_type_hints(type(self))
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            unions = (hints[name], *get_args(hints[name]))
            words = [
                word for hint in unions if get_origin(hint) is Literal for word in hint.__args__
            ]
            if words and value is not None and value not in words:
                self.refuse(name, f"must be one of {', '.join(words)}")

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

    def decoder_layer(self, model: nn.Module, layer: int | None, share: float) -> int:
        """The setting ``layer``, or where it is None the one at ``share`` of the decoder's layers.

        Raises:
            ValueError: the model has no such layer.
        """
        count = len(decoder_layers(model)[1])
        if layer is not None and not 0 <= layer < count:
            self.refuse("layer", f"must be one of the model's {count} decoder layers, from 0")
        return int(share * count) if layer is None else layer

    def targets(self, model: nn.Module) -> Sequence[str] | None:
        """The linears that are adapted, as ``targets`` of `swap_linears`; None: the user's."""
        return None

    @property
    def starts_elsewhere(self) -> bool:
        """True where `begin` gives the adapters another start than zero."""
        return False

    def begin(
        self,
        model: nn.Module,
        forget: Sequence[Mapping[str, Tensor]],
        retain: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """Give the adapters their start, without a change of what the model says.

        Args:
            model: just swapped.
            forget: answers to forget, two in each batch, as `answer_nll` takes them.
            retain: answers to keep, likewise.
        """
        raise NotImplementedError

    def start(self) -> dict[str, float]:
        """Numbers that change while training, by name: ``batch.state``, and kept in checkpoints."""
        return {}

    def after_step(
        self, state: Mapping[str, float], epoch: float, parts: Mapping[str, float]
    ) -> dict[str, float]:
        """The numbers of the next step.

        Args:
            state: those of this one.
            epoch: passes over the questions to forget before this step.
            parts: of the loss, means over all questions of this step.
        """
        return dict(state)

    def at(self, progress: float) -> Method:
        """This method in the phase that ``progress`` is in, the share of all steps that is done."""
        return self

    def rate(self, name: str) -> float:
        """Factor on train.lr for the parameter of that name; 0: not trained in this phase."""
        return 1.0

    def lacks(self, forget: Sequence[QA]) -> str | None:
        """A line on the field that records to forget lack, and on what stands in for it."""
        if SAFE not in self.rows:
            return None
        field, instead = "safe_target", "those of data.safe_targets, or built-in refusals, stand in"
        if self.alternatives:
            field, instead = "alternatives", "their safe targets stand in"
        bare = sum(not getattr(qa, field) for qa in forget)
        text = f"{bare} of {len(forget)} forget records have no {field}; {instead}."
        return text if bare else None

    def check_records(self, forget: Sequence[QA], retain: Sequence[QA]) -> None:
        """Raise ValueError where there are too few of them."""

    def domains(self, forget: Sequence[QA]) -> list[int] | None:
        """Number of each forget record's domain, where rows of a batch have to know theirs."""
        return None

    def adapt(
        self,
        model: nn.Module,
        swap: SwapReport,
        tokenizer: Any,
        forget: Sequence[QA],
        retain: Sequence[QA],
    ) -> SwapReport:
        """Change the adapters that `swap_linears` made, whose report is ``swap``; returns it."""
        return swap

    def save(self, model: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write the trained adapters into the folder ``path``, for `load_adapter`."""
        save_lora_adapter(model, path, metadata=dict(metadata))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The parts, unweighted, and "total", which is differentiated; scalars.

        Args:
            batch: the `Answers` of each kind in ``rows``.
        """
        raise NotImplementedError

    def make_guard(
        self,
        model: nn.Module,
        tokenizer: Any,
        forget: Sequence[str],
        retain: Sequence[str],
        *,
        seed: int,
        measure: Callable[[], float],
        note: Callable[..., None],
    ) -> AttachedGuard:
        """The guard that stands in place of adapters, attached to ``model``.

        Args:
            forget: raw questions whose answers are to be forgotten.
            retain: raw questions whose answers stay.
            measure: mean probability of the answers to forget, as the model now gives them.
            note: note(step, probability, NAME=number, …) records one try, the guard being so.
        """
        raise NotImplementedError

    def score(self, start: Mapping[str, float], now: Mapping[str, float]) -> float | None:
        """The worth of an evaluation's adapters; None where they may not be kept.

        Args:
            start: results before the first step: forget_prob, retain_prob and retain_accuracy, the
                share of retain answers that the model predicts token by token.
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
        w_forget: weight of the forget term.
        w_retain: weight of the retain term.
        retain: "nll", or "kl", which costs one more forward of the retain rows.
        compat: "open-unlearning" divides the sum of the KL over all positions, prompt and padding
            included, by their number, and costs a third forward; for retain "kl" alone, but for
            methods that say otherwise.
    """

    w_retain: float = 1.0
    retain: Literal["nll", "kl"] = "nll"
    compat: Compat | None = None

    rows = (FORGET, RETAIN)
    parts = ("forget", "retain")
    read_by_forget: ClassVar[bool] = False  # compat is

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compat is not None and self.retain != "kl" and not self.read_by_forget:
            self.refuse("compat", 'changes nothing here but with retain "kl"; leave it out')

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        parts = super().loss(batch)
        kept = batch[RETAIN]
        if self.retain == "nll":
            parts["retain"] = mean(kept.nll)
        else:
            parts["retain"] = mean(kept.kl() if self.compat is None else kept.everywhere().kl())
        parts["total"] = parts["total"] + self.w_retain * parts["retain"]
        return parts


@functools.cache
def say_once(text: str) -> None:
    """A warning, the first time that this process has it."""
    logger.warning("%s", text)


def mean(values: Tensor) -> Tensor:
    """Mean; 0 of nothing."""
    return values.sum() / max(1, values.numel())
