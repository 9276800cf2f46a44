"""LUNE: other answers are taught, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from nsru_train.losses.batch import FORGET, SAFE, Batch
from nsru_train.methods.method import Method, mean, say_once


@dataclass(frozen=True)
class LUNE(Method):
    """Cross-entropy of a record's alternatives ("negatives") alone: no suppression, no retain term.

    The evaluation that forgets most is kept, of those at which the model still gives all retain
    answers but a share of ``guard`` that it gave at the start, word for word. The paper guards its
    accuracy on neighbouring questions, relative to the base model's; that these are the retain set,
    and right to the word, is our reading. So is that the other answers may be safe targets.

    The abstract says that it "targets intermediate representations", and what we have of the paper
    not how. ``suppress_states`` is our reading: it adds c², where c = <h, h_base> / ‖h_base‖² is
    how much of the base model's state is left in that of an answer to forget, after one layer; a
    mean over tokens, 1 at the start.

    Args:
        guard: share of the retain answers given at the start that may be lost, 0 to 1.
        suppress_states: weight of that term; 0 leaves it out.
        layer: whose output it compares, from 0; None is the middle one.

    Source: arXiv 2512.07375; 0.005 from a replication of its appendix.
    """

    guard: float = 0.005
    suppress_states: float = 0.0
    layer: int | None = None

    rows = (SAFE,)
    alternatives = True
    parts = ("safe",)
    keeps_best = True
    ranges = {
        "guard": "must be a share from 0 to 1",
        "suppress_states": "must not be negative",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.suppress_states:  # of this object alone, which is frozen
            object.__setattr__(self, "rows", (SAFE, FORGET))
            object.__setattr__(self, "parts", ("safe", "states"))
        elif self.layer is not None:
            self.refuse("layer", "is read by suppress_states alone; give that a weight")

    def prepare(self, model: nn.Module) -> LUNE:
        if not self.suppress_states:
            return self
        return replace(self, layer=self.decoder_layer(model, self.layer, 1 / 2))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        total = safe = mean(batch[SAFE].nll)
        parts = {"safe": safe}
        if self.suppress_states:
            assert self.layer is not None, "prepare(model) says which layer"
            now, base = (batch[FORGET].hidden(self.layer, with_adapters=w) for w in (True, False))
            left = (now.float() * base.float()).sum(1) / base.float().square().sum(1)
            parts["states"] = mean(left.square())
            total = safe + self.suppress_states * parts["states"]
        return {**parts, "total": total}

    def score(self, start: Mapping[str, float], now: Mapping[str, float]) -> float | None:
        if not start["retain_accuracy"]:
            say_once(
                "lune: the model gives no retain answer word for word at the start, so that guard "
                "keeps none. Give retain answers that it knows."
            )
        kept = now["retain_accuracy"] >= start["retain_accuracy"] * (1 - self.guard)
        return -now["forget_prob"] if kept else None
