"""Teacher-forced scores of answers, batched by length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from nsru_kernels.nn.inputs import evaluating
from nsru_train.data.encode import Encoded, collate, length_batches, pad_token_id
from nsru_train.language_models import check_sequences
from nsru_train.losses.nll import (
    AnswerHidden,
    AnswerLogits,
    answer_states,
    reads_prompts_once,
    shared_states,
)
from nsru_train.shares import Shares

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NOT_ASKED = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Score:
    """One sequence's answer, token by token; last comes what ends the turn, such as EOS."""

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

    The head sees answer positions only. A prompt that several answers follow, as TOFU's wrong ones
    do, is read once where the model's state is a KV cache. The model is put in eval mode and left
    as it was.

    Args:
        encoded: sequences, in any order.
        predict: for each sequence, whether `predictions` is wanted; None for none of them.
        max_tokens: most tokens of a batch, padding included; a single longer sequence gets its own.

    Raises:
        ValueError: a sequence is longer than the model's position table, or its NLL is not finite.
    """
    found = score_share(
        Shares(), model, tokenizer, encoded, predict=predict, max_tokens=max_tokens,
        progress=progress,
    )  # fmt: skip
    return [found[i] for i in range(len(encoded))]


def score_share(
    shares: Shares,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    *,
    predict: Sequence[bool] | None = None,
    max_tokens: int = 4096,
    progress: bool = False,
) -> dict[int, Score]:
    """Index -> score of the sequences in this process's batches, each as one process has it.

    Args, Raises: as in `score_sequences`.
    """
    check_sequences(model, encoded)
    predict = [False] * len(encoded) if predict is None else predict
    scores: dict[int, Score] = {}
    batches = shares.of(_batches(model, encoded, max_tokens))
    asked = sum(len(indices) for _, indices in batches)
    with (
        evaluating(model),
        tqdm(total=asked, desc="scoring", unit="seq", disable=not progress, leave=False) as bar,
    ):
        for apart, indices in batches:
            items = [encoded[i] for i in indices]
            states = (_apart if apart else _together)(model, items, pad_token_id(tokenizer, model))
            ends = np.cumsum([len(item) - item.answer_start for item in items])[:-1]
            nll = np.split(states.nll().double().cpu().numpy(), ends)
            tokens = [_NOT_ASKED] * len(items)
            if any(predict[i] for i in indices):
                tokens = np.split(states.predictions().cpu().numpy(), ends)
            for i, values, chosen in zip(indices, nll, tokens, strict=True):
                if not np.isfinite(values).all():
                    raise ValueError(
                        f"NLL of sequence {i} is {values.mean()}: the model's weights hold NaN or "
                        "infinite values, or overflow in its dtype, or its head masks a token that "
                        "is scored. Did training diverge?"
                    )
                scores[i] = Score(values, chosen if predict[i] else _NOT_ASKED)
            bar.update(len(indices))
    return scores


# Answers from which on a prompt is read apart from them: fewer save less than smaller batches cost.
_MANY = 3


def _batches(
    model: nn.Module, encoded: Sequence[Encoded], max_tokens: int
) -> list[tuple[bool, list[int]]]:
    """(whether prompts are read apart from the answers, indices) of every batch."""
    plain = length_batches(encoded, max_tokens)
    answers: dict[tuple[int, ...], list[int]] = {}
    for i, item in enumerate(encoded):
        answers.setdefault(tuple(item.input_ids[: item.answer_start]), []).append(i)
    many = [indices for indices in answers.values() if len(indices) >= _MANY]
    if not many or not reads_prompts_once(model, encoded[many[0][0]].input_ids):
        return [(False, indices) for indices in plain]
    shared = list(_shared_batches(encoded, many, max_tokens))
    rest = sorted(set(range(len(encoded))).difference(*shared))
    again = length_batches([encoded[i] for i in rest], max_tokens)
    return [
        *((True, indices) for indices in shared),
        *((False, [rest[i] for i in indices]) for indices in again),
    ]


def _shared_batches(
    encoded: Sequence[Encoded], many: Sequence[Sequence[int]], max_tokens: int
) -> Iterator[list[int]]:
    """Batches of the answers to prompts with many, of one length and long answers first."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for indices in many:
        by_length.setdefault(encoded[indices[0]].answer_start, []).append(indices)
    for _, groups in sorted(by_length.items(), reverse=True):
        batch: list[int] = []
        width = 0
        for indices in sorted(groups, key=lambda found: -max(len(encoded[i]) for i in found)):
            for i in indices:
                wider = max(width, len(encoded[i]))
                if batch and (len(batch) + 1) * wider > max_tokens:
                    yield batch
                    batch, wider = [], len(encoded[i])
                batch.append(i)
                width = wider
        yield batch


def _together(model: nn.Module, items: Sequence[Encoded], pad: int) -> AnswerHidden | AnswerLogits:
    batch, device = collate(items, pad), next(model.parameters()).device
    return answer_states(model, {k: v.to(device) for k, v in batch.items()})


def _apart(model: nn.Module, items: Sequence[Encoded], pad: int) -> AnswerHidden:
    device, start = next(model.parameters()).device, items[0].answer_start
    texts = [tuple(item.input_ids[:start]) for item in items]
    prompts = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    answers = [torch.tensor(item.input_ids[start:]) for item in items]
    return shared_states(
        model,
        torch.tensor(list(prompts), device=device),
        torch.tensor([prompts[text] for text in texts], device=device),
        nn.utils.rnn.pad_sequence(answers, True, pad).to(device),
        torch.tensor([len(answer) for answer in answers], device=device),
    )


@overload
def quick_probabilities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    *,
    max_tokens: int = ...,
    progress: bool = ...,
) -> float: ...
@overload
def quick_probabilities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Mapping[str, Sequence[Encoded]],
    *,
    max_tokens: int = ...,
    progress: bool = ...,
) -> dict[str, float]: ...
def quick_probabilities(model, tokenizer, encoded, *, max_tokens=4096, progress=False):
    """Mean over sequences of p = exp(-mean token NLL), EOS included.

    Of a set whose name ends in "_accuracy" the share of sequences that the model predicts token by
    token, as its greedy answers would be.

    Cheap enough for every point of a training curve: encode once, outside. Several named sets go
    through one pass.

    Args:
        encoded: sequences, or name -> sequences; one that is in several sets is scored once.
        max_tokens: most tokens of a batch, padding included.
        progress: show a progress bar.

    Returns:
        The mean, or name -> mean.

    Raises:
        ValueError: a set is empty, or as in `score_sequences`.
    """
    sets = encoded if isinstance(encoded, Mapping) else {"encoded": encoded}
    for name, items in sets.items():
        if not items:
            raise ValueError(f"quick_probabilities: {name} is empty; give at least one sequence.")
    asked = {id(item): item for items in sets.values() for item in items}
    right = {id(i) for name, items in sets.items() if name.endswith("_accuracy") for i in items}
    found = score_sequences(
        model, tokenizer, list(asked.values()), predict=[key in right for key in asked],
        max_tokens=max_tokens, progress=progress,
    )  # fmt: skip
    scores = dict(zip(asked, found, strict=True))

    def value(name: str, item: Encoded) -> float:
        score = scores[id(item)]
        if name.endswith("_accuracy"):
            return float(np.array_equal(score.predictions, item.input_ids[item.answer_start :]))
        return score.probability

    means = {
        name: float(np.mean([value(name, item) for item in items])) for name, items in sets.items()
    }
    return means if isinstance(encoded, Mapping) else means["encoded"]
