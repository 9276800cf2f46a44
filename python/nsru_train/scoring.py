"""Forward passes of evaluation, batched by length: teacher-forced scores and greedy answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from torch import nn

from nsru_kernels.nn.inputs import evaluating
from nsru_train.data.encode import (
    Encoded,
    collate,
    encode_prompt,
    length_batches,
    pad_token_id,
)
from nsru_train.losses.nll import answer_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_NOT_ASKED = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Score:
    """One sequence's answer, token by token, EOS last."""

    nll: np.ndarray  # [n] float64, nats
    predictions: np.ndarray  # [n] argmax of the teacher-forced logits; [0] where not asked for

    @property
    def loss(self) -> float:
        """Mean NLL per token."""
        return float(self.nll.mean())

    @property
    def probability(self) -> float:
        """exp(-loss): TOFU's probability of an answer."""
        return float(np.exp(-self.nll.mean()))


def score_sequences(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    *,
    predict: Sequence[bool] | None = None,
    max_tokens: int = 4096,
    progress: bool = False,
) -> list[Score]:
    """Token NLLs of each answer, and its argmax predictions where asked for; one forward each.

    The head sees answer positions only. The model is put in eval mode and left as it was.

    Args:
        encoded: sequences, in any order.
        predict: for each sequence, whether `predictions` is wanted; None for none of them.
        max_tokens: most tokens of a batch, padding included.

    Raises:
        ValueError: a sequence is longer than max_tokens, or its NLL is not finite.
    """
    predict = [False] * len(encoded) if predict is None else predict
    scores: list[Score | None] = [None] * len(encoded)
    device = _device(model)
    with evaluating(model), _bar(len(encoded), "scoring", progress) as bar:
        for indices in length_batches(encoded, max_tokens):
            items = [encoded[i] for i in indices]
            batch = collate(items, pad_token_id(tokenizer))
            states = answer_states(model, {k: v.to(device) for k, v in batch.items()})
            ends = np.cumsum([len(item) - item.answer_start for item in items])[:-1]
            nll = np.split(states.nll().double().cpu().numpy(), ends)
            tokens = [_NOT_ASKED] * len(items)
            if any(predict[i] for i in indices):
                tokens = np.split(states.predictions().cpu().numpy(), ends)
            for i, values, chosen in zip(indices, nll, tokens, strict=True):
                if not np.isfinite(values).all():
                    raise ValueError(
                        f"NLL of sequence {i} is {values.mean()}: the model's weights hold NaN or "
                        "infinite values, or overflow in its dtype. Did training diverge?"
                    )
                scores[i] = Score(values, chosen if predict[i] else _NOT_ASKED)
            bar.update(len(indices))
    return [score for score in scores if score is not None]


@overload
def quick_probabilities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    *,
    max_tokens: int = ...,
) -> float: ...
@overload
def quick_probabilities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Mapping[str, Sequence[Encoded]],
    *,
    max_tokens: int = ...,
) -> dict[str, float]: ...
def quick_probabilities(model, tokenizer, encoded, *, max_tokens=4096):
    """Mean over sequences of p = exp(-mean token NLL), EOS included.

    Cheap enough for every point of a training curve: encode once, outside. Several named sets go
    through one pass.

    Args:
        encoded: sequences, or name -> sequences.
        max_tokens: most tokens of a batch, padding included.

    Returns:
        The mean, or name -> mean.

    Raises:
        ValueError: a set is empty, or as in `score_sequences`.
    """
    sets = encoded if isinstance(encoded, Mapping) else {"encoded": encoded}
    for name, items in sets.items():
        if not items:
            raise ValueError(f"quick_probabilities: {name} is empty; give at least one sequence.")
    flat = [item for items in sets.values() for item in items]
    scores = iter(score_sequences(model, tokenizer, flat, max_tokens=max_tokens))
    means = {
        name: float(np.mean([next(scores).probability for _ in items]))
        for name, items in sets.items()
    }
    return means if isinstance(encoded, Mapping) else means["encoded"]


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 200,
    max_tokens: int = 4096,
    progress: bool = False,
) -> list[str]:
    """The model's greedy answer to each question, special tokens and outer white space removed.

    Left padding and a KV cache. Sampling settings and penalties of the model's own generation
    config are not used; its EOS tokens are. Equal questions are answered once.

    Args:
        max_new_tokens: longest answer.
        max_tokens: most tokens of a batch, padding and max_new_tokens included, which bounds the
            KV cache; a single longer sequence still gets its own batch.
    """
    if hasattr(model, "get_base_model"):  # PEFT's adapters live in the base model's modules
        model = model.get_base_model()
    prompts = {question: encode_prompt(tokenizer, question) for question in questions}
    order = sorted(prompts, key=lambda question: -len(prompts[question]))
    pad = pad_token_id(tokenizer)
    device = _device(model)
    answers: dict[str, str] = {}
    with (
        evaluating(model),
        _greedy_config(model, tokenizer, max_new_tokens),
        _bar(len(order), "answering", progress) as bar,
    ):
        while order:
            width = len(prompts[order[0]])
            rows = max(1, max_tokens // (width + max_new_tokens))
            batch, order = order[:rows], order[rows:]
            input_ids = torch.full((len(batch), width), pad, device=device)
            attention_mask = torch.zeros_like(input_ids)
            for row, question in enumerate(batch):
                ids = prompts[question]
                input_ids[row, width - len(ids) :] = torch.tensor(ids, device=device)
                attention_mask[row, width - len(ids) :] = 1
            output = model.generate(input_ids=input_ids, attention_mask=attention_mask)
            texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            answers.update(zip(batch, (text.strip() for text in texts), strict=True))
            bar.update(len(batch))
    return [answers[question] for question in questions]


@contextmanager
def _greedy_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> Iterator[None]:
    # Replaced, not passed to generate(): what is passed inherits penalties and sampling settings.
    from transformers import GenerationConfig

    own = model.generation_config
    eos = own.eos_token_id
    stop = {tokenizer.eos_token_id, *(eos if isinstance(eos, Iterable) else [eos])} - {None}
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(stop),
        pad_token_id=pad_token_id(tokenizer),
    )
    try:
        yield
    finally:
        model.generation_config = own


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _bar(total: int, label: str, enabled: bool):
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=label, unit="seq", disable=not enabled, leave=False)
