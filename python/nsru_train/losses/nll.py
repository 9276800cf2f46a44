"""Answer NLL of a language model: one forward of the backbone, the head on answers only."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsru_kernels.nn.inputs import evaluating
from nsru_train.data.encode import IGNORE_INDEX
from nsru_train.language_models import is_encoder_decoder, split_for_decoder
from nsru_train.losses.head import CHUNK_ELEMENTS, Head, gap, token_kl, token_nll, token_score

__all__ = [
    "AnswerHidden",
    "AnswerLogits",
    "answer_logits",
    "answer_nll",
    "answer_states",
    "token_kl",
    "token_nll",
    "token_score",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnswerHidden:
    """Backbone output at the positions that predict a labelled token, and the head that scores it.

    hidden [T, D]; targets and rows [T] long, rows being each token's row in the batch; head holds
    keyword arguments of token_nll and token_kl, head_weight included.
    """

    hidden: Tensor
    targets: Tensor
    rows: Tensor
    head: Mapping[str, Any]

    def nll(self) -> Tensor:
        """-log p of each token, [T] fp32."""
        return token_nll(self.hidden, targets=self.targets, **self.head)

    def kl(self, base: AnswerHidden) -> Tensor:
        """KL(base ‖ self) at each token, [T] fp32."""
        return token_kl(base.hidden, self.hidden, **self.head)

    def score(self, function: Callable[..., Tensor], base: AnswerHidden | None = None) -> Tensor:
        """function(logits, targets[, the base's logits]) at each token, [T]; see `token_score`."""
        hidden_base = None if base is None else base.hidden
        return token_score(
            function, self.hidden, targets=self.targets, hidden_base=hidden_base, **self.head
        )

    def predictions(self) -> Tensor:
        """The most likely token at each position, [T]."""
        # Softcap and scale of the logits keep their order and are left out.
        weight, bias = self.head["head_weight"], self.head["head_bias"]
        chunks = self.hidden.to(weight.dtype).split(max(1, CHUNK_ELEMENTS // weight.shape[0]))
        return torch.cat([nn.functional.linear(h, weight, bias).argmax(-1) for h in chunks])

    def select(self, keep: Tensor) -> AnswerHidden:
        """The tokens where keep [T] is True."""
        return AnswerHidden(self.hidden[keep], self.targets[keep], self.rows[keep], self.head)


@dataclass(frozen=True)
class AnswerLogits:
    """AnswerHidden's counterpart for a head that is not a plain linear: logits [T, V] in fp32."""

    logits: Tensor
    targets: Tensor
    rows: Tensor

    def nll(self) -> Tensor:
        return torch.nn.functional.cross_entropy(self.logits, self.targets, reduction="none")

    def kl(self, base: AnswerLogits) -> Tensor:
        log_q, log_p = base.logits.log_softmax(-1), self.logits.log_softmax(-1)
        return (log_q.exp() * gap(log_q, log_p)).sum(-1)

    def score(self, function: Callable[..., Tensor], base: AnswerLogits | None = None) -> Tensor:
        return function(self.logits, self.targets, *(() if base is None else (base.logits,)))

    def predictions(self) -> Tensor:
        return self.logits.argmax(-1)

    def select(self, keep: Tensor) -> AnswerLogits:
        return AnswerLogits(self.logits[keep], self.targets[keep], self.rows[keep])


def unmasked(logits: Tensor) -> Tensor:
    """Where logits [..., V] are not those of a masked part of the vocabulary, of probability 0."""
    return ~(logits < logits.amax(-1, keepdim=True) - 1e4)


def answer_nll(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """-log p of every labelled token; only their positions go through the head.

    Args:
        model: a Hugging Face language model, with or without (PEFT or NSRU) adapters. One
            with an attribute reads_prompt = True also gets prompt_mask [B, S].
        batch: input_ids [B, S], attention_mask [B, S], labels [B, S] with -100 outside the answer;
            further entries go to the model. A label at position t is predicted from position t-1;
            an encoder-decoder reads what precedes the answers, and predicts them by its decoder.

    Returns:
        nll [T] fp32, differentiable, and rows [T] long (each token's batch row), in reading order.

    Raises:
        ValueError: batch has no input_ids or labels.

    Examples:
        >>> nll, rows = answer_nll(model, batch)  # doctest: +SKIP
        >>> torch.zeros(len(batch["labels"])).index_add_(0, rows, nll)  # doctest: +SKIP
    """
    states = answer_states(model, batch)
    return states.nll(), states.rows


def answer_states(model: nn.Module, batch: Mapping[str, Tensor]) -> AnswerHidden | AnswerLogits:
    """The labelled tokens, ready to be scored: NLL and KL from one forward; see `answer_nll`.

    The first call for a model and its head compares its logits on a few tokens with those of the
    head alone.
    """
    causal, inputs, rows, positions, targets = _take_apart(model, batch)
    head = _head_of(causal, inputs)
    if head is None:
        return answer_logits(model, batch)
    hidden = causal.base_model(**inputs, use_cache=False)[0][rows, positions]
    return AnswerHidden(hidden, targets, rows, head)


def shared_states(
    model: nn.Module, prompts_GP: Tensor, rows: Tensor, answers_BA: Tensor, lengths: Tensor
) -> AnswerHidden:
    """`answer_states` of several answers to each prompt, which the model reads once.

    For a model of which `reads_prompts_once` is true.

    Args:
        prompts_GP: prompts of one length.
        rows: [B], the prompt of each answer.
        answers_BA: tokens of the answers, padded on the right.
        lengths: [B], their numbers of tokens.
    """
    causal: Any = getattr(model, "get_base_model", lambda: model)()
    head = _head_of(causal, {"input_ids": prompts_GP})
    assert head is not None
    prompt = causal.base_model(input_ids=prompts_GP, use_cache=True)
    hidden_BAD = prompt[0][rows, -1:]
    if answers_BA.shape[1] > 1:
        cache, before = prompt[cache_name()], answers_BA[:, :-1]
        cache.batch_select_indices(rows)
        # Padding is not masked: nothing that counts comes after it.
        mask = before.new_ones(len(rows), prompts_GP.shape[1] + before.shape[1])
        more = causal.base_model(
            input_ids=before, attention_mask=mask, use_cache=True, **{cache_name(): cache}
        )
        hidden_BAD = torch.cat([hidden_BAD, more[0]], 1)
    places = torch.arange(answers_BA.shape[1], device=rows.device)
    answer, place = (places < lengths.unsqueeze(1)).nonzero(as_tuple=True)
    return AnswerHidden(hidden_BAD[answer, place], answers_BA[answer, place], answer, head)


def reads_prompts_once(model: nn.Module, tokens: Sequence[int]) -> bool:
    """True where `shared_states` knows the model: it keeps a KV cache, and its head is plain.

    A few tokens show it, of a text like those to come.
    """
    causal: Any = getattr(model, "get_base_model", lambda: model)()
    ids = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    return keeps_cache(causal) and _head_of(causal, {"input_ids": ids}) is not None


@functools.cache
def cache_name() -> str:
    """The name of a KV cache in arguments and outputs of transformers, which has two over time."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    known = BaseModelOutputWithPast.__dataclass_fields__
    return "cache" if "cache" in known else "past_key_values"


_caching: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@torch.no_grad()
def keeps_cache(model: Any) -> bool:
    """True where all that a causal model keeps of a prompt is a KV cache, whose rows can be chosen.

    A hook before its backbone, as a guard's, knows the rows by their number.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    backbone = getattr(model, "base_model", model)
    if backbone is model or backbone._forward_pre_hooks:
        return False
    if model not in _caching:
        token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
        cache = None
        with evaluating(model), contextlib.suppress(Exception):  # then it is read the plain way
            cache = getattr(backbone(token, use_cache=True), cache_name(), None)
        layers = {type(layer) for layer in getattr(cache, "layers", ())}
        plain = layers <= {DynamicLayer, DynamicSlidingWindowLayer}
        _caching[model] = type(cache) is DynamicCache and plain
    return _caching[model]


def answer_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> AnswerLogits:
    """Logits of the labelled tokens as the model itself computes them; see `answer_nll`."""
    causal, inputs, rows, positions, targets = _take_apart(model, batch)
    return AnswerLogits(_own_logits(causal, inputs)[rows, positions].float(), targets, rows)


def _take_apart(
    model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Any, dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Causal model, its inputs, and row, position and token of each prediction."""
    for name in ("input_ids", "labels"):
        if name not in batch:
            raise ValueError(f"answer_nll: batch must hold {name!r}, got {sorted(batch)}.")
    # PEFT changes its base model in place.
    causal = getattr(model, "get_base_model", lambda: model)()
    if is_encoder_decoder(causal):
        inputs, labels_BN = split_for_decoder(causal, batch)
        rows, positions = (labels_BN != IGNORE_INDEX).nonzero(as_tuple=True)
        return causal, inputs, rows, positions, labels_BN[rows, positions]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if getattr(causal, "reads_prompt", False):
        inputs["prompt_mask"] = batch["labels"] == IGNORE_INDEX
    next_token = batch["labels"][:, 1:]
    rows, positions = (next_token != IGNORE_INDEX).nonzero(as_tuple=True)
    return causal, inputs, rows, positions, next_token[rows, positions]


def _own_logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    # The class's forward: a trainer may have put its loss in place of the instance's.
    return type(model).forward(model, **inputs, use_cache=False).logits


# For each model and what a swap, a merge, a hook or a patch of its head changes: logit_softcap and
# logit_scale, or None where only the model makes its logits.
_head_forms: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, dict[str, Any] | None]] = (
    weakref.WeakKeyDictionary()
)


def _head_of(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any] | None:
    find = getattr(model, "get_output_embeddings", None)
    linear: Any = None if find is None else find()
    forms = _head_forms.setdefault(model, {})
    hooks = (getattr(linear, name, ()) for name in ("_forward_pre_hooks", "_forward_hooks"))
    key = type(linear), *map(tuple, hooks), id(getattr(linear, "__dict__", {}).get("forward"))
    if key not in forms:
        forms[key] = _probe_head(model, linear, inputs)
    form = forms[key]
    if form is None:
        return None
    return {"head_weight": linear.weight, "head_bias": linear.bias, **form}


def _probe_head(model: Any, linear: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The softcap and scale with which the head's linear alone gives the model's own logits."""
    if linear is None or getattr(model, "base_model", model) is model:
        reason = "it has no separate backbone and output layer"
    elif type(linear) is not nn.Linear:
        # An adapted head passes the comparison below as long as its adapter is zero.
        reason = f"its output layer is a {type(linear).__name__}, not an nn.Linear"
    else:
        reason = "no softcap and scale in its config turn head(hidden) into its logits"
        forms = _forms_in_config(model.config)
        probe = _first_tokens(inputs)
        with evaluating(model):
            expected = _own_logits(model, probe).float()
            hidden = model.base_model(**probe, use_cache=False)[0].to(linear.weight.dtype)
            if hidden.shape[-1] == linear.in_features:
                plain = nn.functional.linear(hidden, linear.weight, linear.bias).float()
            else:
                forms = []  # something stands between them
        relative = 2**-7 if linear.weight.dtype.itemsize < 4 else 1e-4
        if (bias := getattr(model, "final_logits_bias", None)) is not None and bias.any():
            forms = []  # of BART's kind; 16 bits may hide it
        for form in forms:
            head = Head(form["logit_softcap"], form["logit_scale"], rows=1)
            found, seen = head.bound(plain * head.scale), unmasked(expected)
            difference = (found - expected)[seen].abs().max()
            # A model can mask a part of the vocabulary after its head, as Chameleon does.
            if difference <= relative * expected[seen].abs().max() and unmasked(found).equal(seen):
                return form
    logger.warning(
        "%s: full logits are computed, which takes more memory, because %s.",
        type(model).__name__,
        reason,
    )
    return None


def _first_tokens(inputs: Mapping[str, Tensor], count: int = 16) -> dict[str, Tensor]:
    ids = inputs["input_ids"][0]
    if (mask := inputs.get("attention_mask")) is not None:
        ids = ids[mask[0].bool()]
    ids = ids[:count].unsqueeze(0)
    answers = {k: v[:1, :count] for k, v in inputs.items() if k == "decoder_input_ids"}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **answers}


def _forms_in_config(config: Any) -> list[dict[str, Any]]:
    """Candidates for softcap and scale; those that the configuration names come first."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    def named(*names: str) -> list[float]:
        values = (getattr(text, name, None) for name in names)
        return [float(value) for value in values if isinstance(value, (int, float)) and value]

    softcaps = named("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    scales = [
        scale
        for value in named("logits_scaling", "logit_scale", "lm_head_multiplier")
        for scale in (1 / value, value)  # Granite divides, Cohere multiplies
    ]
    return [
        {"logit_softcap": softcap, "logit_scale": scale}
        for softcap in (*softcaps, None)
        for scale in (*scales, 1.0)
    ]
