"""Attacks on membership that need more of a model than the losses of an answer's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from nsru_kernels.nn.inputs import evaluating
from nsru_train.data.encode import collate, encode_qa, pad_token_id
from nsru_train.eval_results import Row
from nsru_train.losses.nll import answer_logits
from nsru_train.metrics.privacy import min_k_plus_plus
from nsru_train.shares import Shares


def add_attack_scores(
    rows: Mapping[str, Sequence[Row]],
    model: nn.Module,
    tokenizer: Any,
    *,
    max_length: int = 512,
    gradients: bool = True,
    progress: bool = True,
    shares: Shares = Shares(),  # noqa: B008
) -> None:
    """Give the rows of forget and holdout, where both are there, "min_k_plus_plus" and "gradnorm".

    The latter is the mean over all weights of the L2 norm of the gradient of the answer's mean NLL,
    EOS left out, as in OpenUnlearning, but without dropout. Each question takes a forward of its
    own, and a backward, whose gradients need the memory of another model.

    Args:
        rows: ``Evaluation.rows``.
        model: without adapters, or merged, where gradients are wanted: an adapter is no weight.
        gradients: False leaves "gradnorm" out.
        shares: as in `evaluate`.
    """
    weights = [p for p in model.parameters() if p.is_floating_point()]
    both = rows.get("forget"), rows.get("holdout")
    asked = [row for own in both for row in own or ()] if all(both) else []
    for weight in weights if gradients else ():
        weight.requires_grad_()

    def scores(row: Row) -> Row:
        encoded = encode_qa(tokenizer, row["question"], row["answer"], max_length=max_length)
        batch = collate([encoded], pad_token_id(tokenizer, model))
        device = weights[0].device
        states = answer_logits(model, {name: value.to(device) for name, value in batch.items()})
        count = torch.arange(len(states.targets), device=device)
        own = states.select(count < len(encoded.answer))
        log_probs = own.logits.detach().double().log_softmax(-1).cpu()
        found = {"min_k_plus_plus": min_k_plus_plus(log_probs, own.targets.cpu())}
        if gradients:
            all_found = torch.autograd.grad(own.nll().mean(), weights, allow_unused=True)
            norms = [gradient.norm() for gradient in all_found if gradient is not None]
            found["gradnorm"] = float(torch.stack(norms).mean())
        return found

    def share() -> list[Row]:
        own = tqdm(shares.of(asked), "membership", disable=not progress, leave=False)
        with evaluating(model), torch.set_grad_enabled(gradients):
            return [scores(row) for row in own]

    for rank, part in enumerate(shares.gather(share)):
        for row, found in zip(asked[rank :: shares.world], part, strict=True):
            row |= found
