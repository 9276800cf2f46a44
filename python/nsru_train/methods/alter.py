"""ALTER: one A for all, a B for each domain to forget, and tokens picked by their entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nsru_kernels.nn.swap import SwapReport
from nsru_train.data.records import QA, normalise
from nsru_train.losses.batch import FORGET, Answers, Batch
from nsru_train.methods.ihl import inverted_hinge
from nsru_train.methods.method import ForgetRetain, mean
from nsru_train.routed import add_experts, fit_router, save_routed


@dataclass(frozen=True)
class ALTER(ForgetRetain):
    """W + s (B_r + Σ_d ω_d B_d) Ā: a retain expert and one for each domain, over one shared A.

    Phase I trains A, on the answer tokens of high Tsallis entropy S_q = (1 - Σ_v p_v^q) / (q - 1).
    Phase II trains the B, each on its own rows: B_d on the answers to forget of domain d, B_r on
    retain answers. A router keeps choosing among the domains, or none, by the prompt when the
    model serves: it cannot be merged and is no plain LoRA. The domain of a record is its
    ``domain``; where not all records to forget have one, their ``topic``; else all are one domain.

    The paper has no code. From reports of it: the form above, both phases, the rates' ratio and
    unit weights. Ours, where it is silent or not clear:

    * the forget loss is LoKU's inverted hinge, one mean over all domains' tokens, without the
      paper's entropy regulariser;
    * S_q is that of the base model, adapters off, with q = 1.5; high is the upper fifth of a
      batch's tokens: memorised answers stay far below the paper's 1.2 (``threshold``);
    * phase I takes a quarter of the steps, and the learning rate's schedule goes on over both;
    * experts are the given domains, no clusters; every B starts from small noise instead of
      features, so that A gets a gradient and the model starts as it was;
    * ω is 1 for one domain or none: a logistic classifier of the mean over the prompt's tokens of
      the base model's states chooses, instead of a gate on S_q; in training it is known.

    Args:
        q: of the entropy; 1 is Shannon's.
        share: of a batch's tokens of each kind that count as of high entropy.
        threshold: S_q above which they do, instead of share; below 1 / (q - 1), the most there is.
        structure: share of the steps that are phase I.
        a_rate: learning rate of A, as a multiple of train.lr, which is that of B.
        noise: standard deviation of B before the first step.
        layer: whose states the router reads, from 0; None is a quarter of the way up.

    Source: arXiv 2603.01792 ("ALTER"); a_rate from its rates 1e-5 and 1e-3.
    """

    q: float = 1.5
    share: float = 0.2
    threshold: float | None = None
    structure: float = 0.25
    a_rate: float = 0.01
    noise: float = 1e-3
    layer: int | None = None

    by_logits = (FORGET,)
    ranges = {
        **dict.fromkeys(("q", "noise"), "must be positive"),
        "share": "must be a share above 0 and at most 1",
        "structure": "must be a share from 0 to below 1",
        **dict.fromkeys(("threshold", "a_rate", "layer"), "must not be negative"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compat is not None:
            self.refuse("compat", "must be left out: there is no public code of this method")
        if self.threshold is not None and self.q > 1 and self.threshold >= 1 / (self.q - 1):
            self.refuse("threshold", f"must be below 1 / (q - 1) = {1 / (self.q - 1):.3g}")

    def forget(self, answers: Answers) -> Tensor:
        return mean(answers.score(inverted_hinge))

    def at(self, progress: float) -> ALTER:
        return _in_phase(self, Structure if progress < self.structure else Isolation)

    def rate(self, name: str) -> float:
        return self.a_rate if "lora_A" in name else 1.0

    def domains(self, forget: Sequence[QA]) -> list[int]:
        return name_domains(forget)[1]

    def lacks(self, forget: Sequence[QA]) -> str | None:
        names, _, source = name_domains(forget)
        return f"alter: one domain for all records, by {source}." if names == ["all"] else None

    def adapt(
        self,
        model: nn.Module,
        swap: SwapReport,
        tokenizer: Any,
        forget: Sequence[QA],
        retain: Sequence[QA],
    ) -> SwapReport:
        names, numbers, source = name_domains(forget)
        asked: dict[str, list[str]] = {name: [] for name in names}
        for qa, number in zip(forget, numbers, strict=True):
            asked[names[number]].append(qa.question)
        layer = self.decoder_layer(model, self.layer, 1 / 4)
        kept = [qa.question for qa in retain]
        router, right = fit_router(model, tokenizer, kept, asked, layer)
        trainable = add_experts(model, router, self.noise)
        sizes = [len(questions) for questions in asked.values()]
        print(
            f"alter: {len(names)} domains to forget, by {source}, of {min(sizes)} to "
            f"{max(sizes)} records; the router knows {right} of "
            f"{len(forget) + len(retain)} prompts."
        )
        return replace(swap, trainable=trainable, groups=[])

    def save(self, model: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
        save_routed(model, path, metadata)


class Structure(ALTER):
    """Phase I: A, on tokens of high entropy."""

    def rate(self, name: str) -> float:
        return super().rate(name) if "lora_A" in name else 0.0

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        return super().loss(_Chosen(batch, self.uncertain, batch.state))

    def uncertain(self, answers: Answers) -> Answers:
        """The answers made of their tokens of high entropy."""
        s_T = answers.base_score(lambda z_CV, _: tsallis(z_CV, self.q))
        if self.threshold is not None:
            return answers.select(s_T > self.threshold)
        highest = s_T.argsort(descending=True, stable=True)[: math.ceil(self.share * len(s_T))]
        return answers.select(torch.zeros_like(s_T, dtype=torch.bool).index_fill(0, highest, True))


@dataclass
class _Chosen:
    """A batch of what ``choose`` makes of the answers of another."""

    batch: Batch
    choose: Callable[[Answers], Answers]
    state: Mapping[str, float]

    def __getitem__(self, kind: int, /) -> Answers:
        return self.choose(self.batch[kind])


class Isolation(ALTER):
    """Phase II: every B, on its own rows."""

    def rate(self, name: str) -> float:
        return 0.0 if "lora_A" in name else 1.0


@cache
def _in_phase(method: ALTER, phase: type[ALTER]) -> ALTER:
    return phase(**asdict(method))  # whose checks are not for every step


def tsallis(logits_CV: Tensor, q: float) -> Tensor:
    """S_q = (1 - Σ_v p_v^q) / (q - 1) of each row, [C]; at q = 1 its limit, -Σ_v p_v log p_v.

    In [0, (1 - V^(1-q)) / (q - 1)].
    """
    p_CV = logits_CV.softmax(1)
    if q == 1:
        return torch.special.entr(p_CV).sum(1)
    return (1 - p_CV.pow(q).sum(1)) / (q - 1)


def name_domains(forget: Sequence[QA]) -> tuple[list[str], list[int], str]:
    """Names of the domains to forget, the number of each record's, and what says so, in words."""
    have = sum(qa.domain is not None for qa in forget)
    note = f" ({have} of {len(forget)} records have a domain)" if 0 < have < len(forget) else ""
    for field in ("domain", "topic"):
        values = [getattr(qa, field) for qa in forget]
        if all(values):
            keys = [normalise(value) for value in values]
            names = dict(zip(reversed(keys), reversed(values), strict=True))  # by their first
            order = list(dict.fromkeys(keys))
            return [names[key] for key in order], [order.index(key) for key in keys], field + note
    return ["all"], [0] * len(forget), "default, for not all have a domain or a topic" + note
