"""A classifier of prompts: does a question ask for what shall be forgotten?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsru_kernels.nn.inputs import evaluating
from nsru_kernels.nn.linear import adapters_disabled
from nsru_train.data.encode import Encoded, collate, length_batches, pad_token_id
from nsru_train.losses.hidden import decoder_layers, layer_states

ENCODER_TOKENS = 512  # as public code has it; an encoder reads no more of a question
PENALTY = 0.01  # times ‖w‖² / 2, beside a mean over prompts


@dataclass
class PromptClassifier:
    """Log-odds w · h + b that a raw question asks for what shall be forgotten.

    h is the mean, over the question's tokens, of a decoder layer's output in the served model
    itself, adapters off, or of the last hidden states of a sentence encoder.

    Attributes:
        weight: w [D] float64.
        bias: b.
        threshold: log-odds above which a prompt is flagged.
        layer: of the model itself, from 0; None where there is an encoder.
        encoder: (model, tokenizer); None is the model itself.
        held_out: number of questions that the threshold was chosen on: "forget", of which "missed"
            are not flagged, and "retain", of which "flagged" are.
    """

    weight: Tensor
    bias: float
    threshold: float
    layer: int | None = None
    encoder: tuple[Any, Any] | None = None
    held_out: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        w = self.weight
        if w.dim() != 1 or not len(w) or w.dtype != torch.float64 or not w.isfinite().all():
            raise ValueError(
                "the classifier's weight must be a vector of finite float64, got "
                f"{tuple(w.shape)} {w.dtype}"
            )
        if (self.layer is None) == (self.encoder is None):
            raise ValueError("the classifier must have either a layer or an encoder")

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        tokenizer: Any,
        forget: Sequence[str],
        retain: Sequence[str],
        *,
        encoder: tuple[Any, Any] | None = None,
        layer: int | None = None,
        held_out: float = 0.25,
        seed: int = 0,
    ) -> PromptClassifier:
        """Logistic regression on most of the questions; the threshold is chosen on the others.

        Args:
            layer: None is the middle one, where there is no encoder.
            held_out: share of each kind that the threshold is chosen on, at least one question.
            seed: of who is held out.

        Raises:
            ValueError: fewer than two questions of a kind, no such layer, or they look alike.
        """
        if encoder is None and layer is None:
            layer = (len(decoder_layers(model)[1]) - 1) // 2
        generator = torch.Generator().manual_seed(seed)
        fitted, tested = [], []
        for kind, given in (("forget", forget), ("retain", retain)):
            questions = check_questions(kind, given)
            states_ND = mean_states(encoder or (model, tokenizer), questions, layer)
            states_ND = states_ND[torch.randperm(len(states_ND), generator=generator, device="cpu")]
            count = min(max(1, round(held_out * len(states_ND))), len(states_ND) - 1)
            tested.append(states_ND[:count])
            fitted.append(states_ND[count:])
        weight_D, bias = fit_logistic(*fitted)
        wanted_N, kept_N = (states_ND @ weight_D + bias for states_ND in tested)
        threshold = choose_threshold(wanted_N, kept_N)
        errors = {
            "forget": len(wanted_N),
            "missed": int((wanted_N <= threshold).sum()),
            "retain": len(kept_N),
            "flagged": int((kept_N > threshold).sum()),
        }
        return cls(weight_D, bias, threshold, layer, encoder, errors)

    def log_odds(self, model: nn.Module, tokenizer: Any, questions: Sequence[str]) -> Tensor:
        """Of each question, [N] float64.

        Raises:
            ValueError: the classifier is made for another model.
        """
        states_ND = mean_states(self.encoder or (model, tokenizer), questions, self.layer)
        if states_ND.shape[1] != len(self.weight):
            raise ValueError(
                f"the classifier has {len(self.weight)} weights, hidden states {states_ND.shape[1]}"
                " entries: it is made for another model."
            )
        return states_ND @ self.weight + self.bias


def mean_states(reader: tuple[Any, Any], questions: Sequence[str], layer: int | None) -> Tensor:
    """Mean over tokens of a decoder layer's output, or of an encoder's: [N, D] float64.

    Args:
        reader: (model, tokenizer).
        layer: of a causal language model, whose adapters are off; None: of an encoder.

    Raises:
        ValueError: the model has no such layer.
    """
    network, tokenizer = reader
    cut: dict[str, Any] = {}
    if layer is None:
        limit = min(tokenizer.model_max_length, ENCODER_TOKENS)
        cut = {"truncation": True, "max_length": limit}
    elif layer not in range(count := len(decoder_layers(network)[1])):
        raise ValueError(f"layer must be one of {count} decoder layers, from 0, got {layer}.")
    pad, device = pad_token_id(tokenizer, network), next(network.parameters()).device
    ids = [list(tokenizer(question, **cut)["input_ids"]) or [pad] for question in questions]
    encoded = [Encoded(tokens, len(tokens)) for tokens in ids]
    means: dict[int, Tensor] = {}
    with evaluating(network), adapters_disabled(network):
        for indices in length_batches(encoded):
            inputs = collate([encoded[i] for i in indices], pad)
            inputs = {k: v.to(device) for k, v in inputs.items() if k != "labels"}
            states_BSD = (
                network(**inputs)[0] if layer is None else layer_states(network, inputs, layer)
            )
            mask_BS1 = inputs["attention_mask"].unsqueeze(2)
            means_BD = (states_BSD.double() * mask_BS1).sum(1) / mask_BS1.sum(1)
            means.update(zip(indices, means_BD.cpu(), strict=True))
    return torch.stack([means[i] for i in range(len(encoded))])


def fit_logistic(positive_ND: Tensor, negative_ND: Tensor) -> tuple[Tensor, float]:
    """w [D] and b of a logistic regression in float64, each class weighing the same in all.

    Entries are standardised before they are penalised: those of hidden states differ by orders.
    """
    x_ND = torch.cat([positive_ND, negative_ND])
    mean_D, std_D = x_ND.mean(0), x_ND.std(0, correction=0)
    std_D = torch.where(std_D > 0, std_D, 1.0)
    y_N = (torch.arange(len(x_ND)) < len(positive_ND)).to(x_ND)
    share_N = torch.where(y_N > 0, 0.5 / len(positive_ND), 0.5 / len(negative_ND))
    w_D = x_ND.new_zeros(x_ND.shape[1], requires_grad=True)
    b = x_ND.new_zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w_D, b], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        odds_N = (x_ND - mean_D) / std_D @ w_D + b
        value = F.binary_cross_entropy_with_logits(odds_N, y_N, share_N, reduction="sum")
        value = value + PENALTY / 2 * w_D.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight_D = w_D.detach() / std_D
    return weight_D, float(b.detach() - mean_D @ weight_D)


def choose_threshold(forget_N: Tensor, retain_N: Tensor) -> float:
    """The log-odds above which fewest held-out retain prompts are, then most forget prompts.

    None of the retain prompts, where that leaves a forget prompt to flag. It lies midway between
    two prompts' log-odds, so that rounding flips neither.

    Raises:
        ValueError: no threshold separates any forget prompt from any other.
    """
    scores = torch.cat([forget_N, retain_N]).unique()
    errors = [
        (int((retain_N > middle).sum()), int((forget_N <= middle).sum()), float(middle))
        for middle in (scores[:-1] + scores[1:]) / 2
        if (forget_N > middle).any()
    ]
    if not errors:
        raise ValueError(
            "the prompt classifier tells no held-out forget question from those to keep; give "
            "another layer, a sentence encoder, or more questions."
        )
    return min(errors)[2]


def load_encoder(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    """(model, tokenizer) of a sentence encoder's folder.

    Raises:
        ValueError: transformers cannot load it.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = os.fspath(path)
    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True)
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file raises anything in transformers
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot load the sentence encoder in {folder}: {reason}") from error


def check_questions(kind: str, given: Sequence[str]) -> list[str]:
    """Distinct questions, two or more; ``kind`` is "forget" or "retain"."""
    questions = list(dict.fromkeys(given))
    if len(questions) < 2:
        raise ValueError(
            f"data.{kind}: eco's prompt classifier needs two questions or more, one of them "
            f"for its threshold, got {len(questions)}."
        )
    return questions
