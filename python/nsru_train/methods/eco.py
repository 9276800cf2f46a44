"""ECO: prompts that ask for what shall be forgotten are found, and their embeddings corrupted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from nsru_kernels.subspaces.collection import fingerprint_weights
from nsru_train.data.records import QA
from nsru_train.guard import AttachedGuard, EcoGuard, guard_of
from nsru_train.methods.method import Method
from nsru_train.prompt_classifier import PromptClassifier, check_questions, load_encoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ECO(Method):
    """Nothing is trained in the model: prompts are classified, and those flagged are corrupted.

    The classifier is a logistic regression on mean hidden states, its threshold chosen on questions
    that it was not fitted on. The noise's σ is found by a zeroth-order search on the mean
    probability of the forget answers. Both are ours: the paper tunes RoBERTa, and searches on
    multiple-choice accuracy.

    Args:
        classifier: folder of a sentence encoder to read questions by, such as all-MiniLM-L6-v2;
            None: the model itself.
        layer: of the model itself, whose output is read, from 0; None is the middle one.
        held_out: share of the questions that the threshold is chosen on.
        adapter: folder of a LoRA adapter: flagged prompts get it, others the model without.
        corruption: "rand_noise", "zero_out" or "flip_sign" of embeddings; None is rand_noise, or
            nothing beside an adapter.
        dims: entries of an embedding that are corrupted; None is all.
        select: the "first" of them, or the "top" ones by absolute value.
        sigma: of the noise; None searches it.
        sigma_start: where the search begins, and the least.
        search_lr: σ goes down by this times the slope.
        search_steps: most steps of the search.
        target: mean probability of the forget answers below which it ends; public code ends at an
            accuracy of 0.27, of four choices.
        corrupt_answers: where answers are scored, corrupt their embeddings too, as public code.

    Source: Liu et al. 2024, arXiv 2406.07933; values of the search from its public code.
    """

    classifier: str | None = None
    layer: int | None = None
    held_out: float = 0.25
    adapter: str | None = None
    corruption: Literal["rand_noise", "zero_out", "flip_sign"] | None = None
    dims: int | None = None
    select: Literal["first", "top"] = "first"
    sigma: float | None = None
    sigma_start: float = 0.1
    search_lr: float = 100.0
    search_steps: int = 10
    target: float = 0.1
    corrupt_answers: bool = False

    rows = parts = ()
    trains = False
    ranges = {
        "layer": "must not be negative",
        "held_out": "must be a share above 0 and at most 1",
        "dims": "must be ≥ 1",
        "sigma": "must not be negative",
        "sigma_start": "must be positive",
        "search_lr": "must be positive",
        "search_steps": "must be ≥ 1",
        "target": "must be a share from 0 to 1",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, file in (("classifier", "config.json"), ("adapter", "adapter_config.json")):
            folder = getattr(self, name)
            if folder is not None and not Path(folder, file).is_file():
                self.refuse(name, f"must be a folder with {file}")
        if self.classifier is not None and self.layer is not None:
            self.refuse("layer", "is not read where there is a classifier's folder; leave it out")
        if self.sigma is not None and self.corrupts != "rand_noise":
            self.refuse("sigma", f"is read by rand_noise, not by {self.corrupts}; leave it out")

    @property
    def corrupts(self) -> str | None:
        """The corruption in use."""
        return self.corruption or (None if self.adapter else "rand_noise")

    def check_records(self, forget: Sequence[QA], retain: Sequence[QA]) -> None:
        for kind, records in (("forget", forget), ("retain", retain)):
            check_questions(kind, [qa.question for qa in records])

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
        encoder = None if self.classifier is None else load_encoder(self.classifier)
        classifier = PromptClassifier.fit(
            model, tokenizer, forget, retain,
            encoder=encoder, layer=self.layer, held_out=self.held_out, seed=seed,
        )  # fmt: skip
        guard = EcoGuard(
            classifier,
            corruption=self.corrupts,
            sigma=self.sigma_start if self.sigma is None else self.sigma,
            dims=self.dims,
            select=self.select,
            corrupt_answers=self.corrupt_answers,
            seed=seed,
            adapter=None if self.adapter is None else Path(self.adapter),
            fingerprint=fingerprint_weights(model),
        )
        attached = guard.attach(model, tokenizer)

        def forgotten(sigma: float) -> float:
            guard.sigma = sigma
            return measure()

        if self.sigma is not None or self.corrupts != "rand_noise":
            note(1, measure())
            return attached
        tried = []
        options = (self.sigma_start, self.search_lr, self.search_steps, self.target)
        for step, (sigma, value) in enumerate(search(forgotten, *options), 1):
            note(step, value, sigma=sigma)
            tried.append((value, sigma))
        least, guard.sigma = min(tried, key=lambda one: one[0])
        if least >= self.target:
            logger.warning(
                "eco: no sigma came below objective.target %g; at best forget_prob is %.3f, with "
                "%.3g. What remains is of prompts that are not flagged, or of answers whose words "
                "tell the next (objective.corrupt_answers scores them corrupted).",
                *(self.target, least, guard.sigma),
            )
        return attached

    def save(self, model: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
        attached = guard_of(model)
        assert attached is not None, "make_guard attached one"
        attached.guard.save(path)


def search(
    f: Callable[[float], float], sigma: float, lr: float, steps: int, target: float
) -> Iterator[tuple[float, float]]:
    """Zeroth-order descent: σ + ε and f(σ + ε) of each step, until that is below target.

    g = (f(σ + ε) - f(max(σ - ε, 1e-8))) / 2ε, σ ← max(σ - lr · g, σ₀), with ε = 0.999 σ₀.

    Source: public code of arXiv 2406.07933.
    """
    least, epsilon = sigma, 0.999 * sigma
    for left in reversed(range(steps)):
        value = f(sigma + epsilon)
        yield sigma + epsilon, value
        if value < target or not left:
            return
        slope = (value - f(max(sigma - epsilon, 1e-8))) / (2 * epsilon)
        sigma = max(sigma - lr * slope, least)
