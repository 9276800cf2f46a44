"""A batch after its forward pass, kind by kind: what the loss of a method is made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nsru_kernels as nk
from nsru_kernels.nn.inputs import evaluating
from nsru_train.data.encode import IGNORE_INDEX
from nsru_train.language_models import refuse_encoder_decoder
from nsru_train.losses.hidden import layer_states
from nsru_train.losses.nll import AnswerHidden, AnswerLogits, answer_states

SAFE, FORGET, RETAIN = 0, 1, 2


class Answers:
    """The answers of one kind in a batch.

    Args:
        states: computes their tokens, T of them, in reading order.
        rows: [T] long, each token's answer, from 0.
        count: B, the number of answers.
        ref_nll: [B], summed NLL with adapters off, where the method asked for it.
        nll: computes the tokens' NLL [T]; default: ``states`` do.
        base: computes ``states`` with adapters off.
        hidden: computes the tokens' states [T, D] after a decoder layer, adapters on or off.
        everywhere: computes what the model says at all positions of these rows.
    """

    def __init__(
        self,
        states: Callable[[], AnswerHidden | AnswerLogits],
        rows: Tensor,
        count: int,
        ref_nll: Tensor | None = None,
        *,
        nll: Callable[[], Tensor] | None = None,
        base: Callable[[], AnswerHidden | AnswerLogits] | None = None,
        hidden: Callable[[int, bool], Tensor] | None = None,
        everywhere: Callable[[], Everywhere] | None = None,
    ) -> None:
        self.rows, self.count = rows, count
        self.ref_nll = torch.zeros(count) if ref_nll is None else ref_nll
        self._states: Callable[[], Any] = states
        self._base: Callable[[], Any] | None = base
        self._hidden = hidden
        self._everywhere = everywhere
        self._nll = nll or (lambda: states().nll())

    @cached_property
    def nll(self) -> Tensor:
        """-log p of each token, [T], differentiable."""
        return self._nll()

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each answer, EOS included, [B]."""
        return self.sum(torch.ones_like(self.rows))

    @cached_property
    def sums(self) -> Tensor:
        """NLL of each answer, [B]."""
        return self.sum(self.nll)

    @property
    def means(self) -> Tensor:
        """NLL a token of each answer, [B]."""
        return self.sums / self.lengths.clamp(min=1)

    @property
    def places(self) -> Tensor:
        """Number of each token in its answer, from 0, [T]."""
        first = self.lengths.cumsum(0) - self.lengths
        return torch.arange(len(self.rows), device=self.rows.device) - first[self.rows]

    def sum(self, values: Tensor) -> Tensor:
        """Sums [B] of values [T]. Not by index_add_, whose order of addition varies on a GPU."""
        member_BT = self.rows == torch.arange(self.count, device=self.rows.device).unsqueeze(1)
        return torch.where(member_BT, values, 0).sum(1)

    def score(self, function: Callable[..., Tensor], *, with_base: bool = False) -> Tensor:
        """function(logits, targets[, logits with adapters off]) of each token, [T].

        Only a chunk of the logits exists at a time; see `token_score`.
        """
        return self._states().score(function, self._base() if with_base and self._base else None)

    def base_score(self, function: Callable[..., Tensor]) -> Tensor:
        """function(logits with adapters off, targets) of each token, [T], without gradient."""
        assert self._base is not None, "these answers know no base model"
        with torch.no_grad():
            return self._base().score(function)

    def select(self, keep: Tensor) -> Answers:
        """The same answers made of the tokens where keep [T] is True."""
        base = self._base
        return Answers(
            lambda: self._states().select(keep),
            self.rows[keep],
            self.count,
            self.ref_nll,
            nll=lambda: self.nll[keep],
            base=base and (lambda: base().select(keep)),
        )

    def kl(self) -> Tensor:
        """KL(base ‖ model) of each token, [T]; costs a forward pass with adapters off."""
        assert self._base is not None, "these answers know no base model"
        return self._states().kl(self._base())

    def hidden(self, layer: int, *, with_adapters: bool = True) -> Tensor:
        """The tokens' own states after decoder layer ``layer``, [T, D]; nothing above it runs."""
        assert self._hidden is not None, "these answers know no model"
        return self._hidden(layer, with_adapters)

    def everywhere(self) -> Everywhere:
        """All positions of these rows, for losses that do not stop at answers; two forwards."""
        assert self._everywhere is not None, "these answers know no model"
        return self._everywhere()


@dataclass(frozen=True)
class Everywhere:
    """All positions of rows, padding to the longest included: P = rows · columns of them.

    Args:
        states: of each position, in reading order; its targets are the next token's labels.
        base: the same with adapters off.
        labels: of the tokens themselves [rows, columns], -100 outside the answers.
    """

    states: Any
    base: Any
    labels: Tensor

    @property
    def labelled(self) -> Tensor:
        """Where a position's own token, not the next one, is an answer's, [P]."""
        return self.labels.flatten() != IGNORE_INDEX

    def kl(self) -> Tensor:
        """KL(base ‖ model) at each position, [P]."""
        return self.states.kl(self.base)

    def score(self, function: Callable[..., Tensor]) -> Tensor:
        """function(logits, next labels, logits with adapters off) of all but rows' last positions.

        Labels may be -100."""
        inner = torch.ones_like(self.labels, dtype=torch.bool)
        inner[:, -1] = False
        keep = inner.flatten()
        return self.states.select(keep).score(function, self.base.select(keep))


class Batch(Protocol):
    """The `Answers` of each kind in a batch; ``state`` as the method's `start` says it."""

    state: Mapping[str, float]

    def __getitem__(self, kind: int, /) -> Answers: ...


class ScoredBatch:
    """Rows of several kinds, from one forward pass of the model; ``batch[kind]`` are its `Answers`.

    Args:
        batch: input_ids, attention_mask and labels [B, S], padded on the right; kind and
            ref_nll [B], and domain [B] where the model has an expert for each.
        by_logits: kinds of which no NLL is needed; that of all others is computed at once.
        state: numbers of the method that change while training.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        by_logits: Collection[int] = (),
        state: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.state = state
        self._model, self._by_logits = model, by_logits
        self._kind, self._ref_nll = batch["kind"], batch["ref_nll"]
        own = ("kind", "ref_nll", "domain")
        self._inputs = {k: v for k, v in batch.items() if k not in own}
        self._route = {k: v for k, v in batch.items() if k == "domain"}
        # Of each labelled token, as answer_states has them.
        rows, places = (batch["labels"][:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        self._rows, self._places = rows, places + 1
        self._layers: dict[int, Tensor] = {}

    def __getitem__(self, kind: int) -> Answers:
        chosen = self._kind == kind
        keep = chosen[self._rows]
        return Answers(
            lambda: self._states.select(keep),
            (chosen.cumsum(0) - 1)[self._rows[keep]],
            int(chosen.sum()),
            self._ref_nll[chosen],
            nll=None if kind in self._by_logits else lambda: self._nll[keep[self._with_nll]],
            base=lambda: self._without_adapters(answer_states, chosen),
            hidden=lambda layer, adapted: self._hidden(layer, adapted, chosen),
            everywhere=lambda: self._everywhere(chosen),
        )

    @cached_property
    def _states(self) -> AnswerHidden | AnswerLogits:
        return answer_states(self._model, {**self._inputs, **self._route})

    @cached_property
    def _with_nll(self) -> Tensor:
        by_logits = torch.tensor(list(self._by_logits), device=self._kind.device)
        return ~torch.isin(self._kind, by_logits)[self._rows]

    @cached_property
    def _nll(self) -> Tensor:
        return self._states.select(self._with_nll).nll()

    def _hidden(self, layer: int, adapted: bool, chosen: Tensor) -> Tensor:
        def states(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
            unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
            return layer_states(model, unlabelled, layer)

        keep = chosen[self._rows]
        rows, places = self._rows[keep], self._places[keep]
        if not adapted:
            own_rows = (chosen.cumsum(0) - 1)[rows]
            return self._without_adapters(states, chosen)[own_rows, places]
        if layer not in self._layers:
            self._layers[layer] = states(self._model, self._inputs)
        return self._layers[layer][rows, places]

    def _everywhere(self, chosen: Tensor) -> Everywhere:
        refuse_encoder_decoder(self._model, "a loss of all positions, prompts among them,")
        inputs = self._own_inputs(chosen)
        labels = inputs.pop("labels")
        # A position is scored by the token after it: one more behind the last, and all are scored.
        longer = {name: F.pad(value, (0, 1)) for name, value in inputs.items()}
        longer["labels"] = longer["input_ids"]
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        states = replace(answer_states(self._model, longer), targets=following)
        with evaluating(self._model), nk.adapters_disabled(self._model):
            base = answer_states(self._model, longer)
        return Everywhere(states, base, labels)

    def _own_inputs(self, chosen: Tensor) -> dict[str, Tensor]:
        """Inputs of the chosen rows, as long as the longest of them."""
        width = int(self._inputs["attention_mask"][chosen].sum(1).max())
        return {name: value[chosen, :width] for name, value in self._inputs.items()}

    def _without_adapters(self, function: Callable[..., Any], chosen: Tensor) -> Any:
        """function(model, inputs of the chosen rows) with adapters off and without gradient."""
        with evaluating(self._model), nk.adapters_disabled(self._model):
            return function(self._model, self._own_inputs(chosen))
