"""Texts that a model says of itself: what it knows in general, where no such data is at hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsru_kernels.nn.inputs import evaluating
from nsru_train.data.encode import encode_opening, pad_token_id
from nsru_train.language_models import refuse_encoder_decoder
from nsru_train.scoring import generation_config, position_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def own_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    new_tokens: int = 128,
    batch_size: int = 64,
    seed: int = 0,
    part: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> Iterator[dict[str, Tensor]]:
    """Sample texts from the model at temperature 1, in batches of model inputs.

    A chat model begins where its template opens the user's turn, and so asks itself a question
    before it answers (as in Magpie, arXiv 2406.08464); any other begins after BOS. Every text has
    the same length: a turn or a document that ends early is followed by the next.

    Args:
        count: number of texts.
        new_tokens: tokens sampled for each.
        batch_size: texts sampled together; of each only the KV cache is held.
        part: (i, n): only every n-th batch from batch i on, for the i-th of n processes.
        seed: of the sampling; the global random state is left as it was.

    Yields:
        input_ids, attention_mask: [B, T] int64 on the model's device.

    Raises:
        ValueError: a text would be longer than the model's position table.
    """
    from tqdm.auto import tqdm

    refuse_encoder_decoder(model, "subspace.own_texts")
    device = next(model.parameters()).device
    opening = torch.tensor([encode_opening(tokenizer)], device=device)
    length = opening.shape[1] + new_tokens
    limit = position_limit(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"own texts take {length} tokens, {type(model).__name__} has {limit} positions"
        )
    devices = [device] if device.type == "cuda" else []
    for start in tqdm(
        range(0, count, batch_size)[part[0] :: part[1]],
        "the model's own texts",
        disable=not progress,
        leave=False,
    ):
        begun = opening.expand(min(batch_size, count - start), -1)
        with (
            evaluating(model),
            torch.random.fork_rng(devices),
            generation_config(model, new_tokens, None, pad_token_id(tokenizer, model),
                              do_sample=True),
        ):  # fmt: skip
            torch.manual_seed(seed + start)
            ids = model.generate(input_ids=begun, attention_mask=torch.ones_like(begun))
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
