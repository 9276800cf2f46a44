"""Texts that a model says of itself: what it knows in general, where no such data is at hand."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsru_kernels.nn.inputs import evaluating
from nsru_train.answering import generation_config, greedy_answers
from nsru_train.config import DataConfig
from nsru_train.data.encode import encode_opening, is_too_long, pad_token_id, request_end
from nsru_train.data.records import QA, normalise, shared_questions
from nsru_train.language_models import position_limit, refuse_encoder_decoder
from nsru_train.loading import Data
from nsru_train.shares import from_first
from nsru_train.sources import load_records, save_records

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

REQUEST_TOKENS, ANSWER_TOKENS = 64, 96  # what is longer is not used
ROUNDS = 4  # of sampling, until there are enough that can be used


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


def own_requests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    seed: int = 0,
    progress: bool = True,
) -> list[QA]:
    """Requests that a chat model makes up, each with its greedy answer.

    They are sampled as `own_texts` are. Left out are repetitions, and requests and answers that do
    not come to an end within 64 and 96 tokens; so there can be fewer than ``count``.

    Args:
        count: number of requests.
        seed: of the sampling; the global random state is left as it was.

    Raises:
        ValueError: the tokenizer has no chat template that says where a request ends.
    """
    try:
        end, opening = request_end(tokenizer), len(encode_opening(tokenizer))
    except ValueError as error:
        raise ValueError(f"data.own_requests: {error}; leave it at 0.") from error
    found: dict[str, QA] = {}
    for attempt in range(ROUNDS):
        asked = {}
        for batch in own_texts(
            model, tokenizer, count,
            new_tokens=REQUEST_TOKENS, seed=seed + attempt * count, progress=progress,
        ):  # fmt: skip
            for text in tokenizer.batch_decode(batch["input_ids"][:, opening:]):
                request, ended, _ = text.partition(end)
                if ended and normalise(request) and normalise(request) not in found:
                    asked[normalise(request)] = request.strip()
        answers = greedy_answers(
            model, tokenizer, [*asked.values()], max_new_tokens=ANSWER_TOKENS, progress=progress
        )
        for (key, request), answer in zip(asked.items(), answers, strict=True):
            length = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
            if normalise(answer) and length < ANSWER_TOKENS - 1:
                found[key] = QA(request, answer)
        if len(found) >= count:
            break
    return [*found.values()][:count]


def add_own_requests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    config: DataConfig,
    path: Path,
    *,
    keep: bool,
    progress: bool = True,
) -> None:
    """Let ``data.own`` be the requests that ``config`` asks for, and write them to ``path``.

    Left out are those of another set, and those that hold a word which marks what is to be
    forgotten: one of every fifth forget record, and of hardly any retain record.

    Args:
        keep: take those in ``path``, of the run that goes on.

    Raises:
        ValueError: as `own_requests`.
    """
    count = config.own_requests
    if not count:
        return
    if keep and path.exists():
        data.own = load_records(str(path))
        return
    found = from_first(own_requests(model, tokenizer, count, progress=progress))
    marks = _marks(data.forget, data.retain)
    taken = shared_questions(found, [qa for records in data.splits().values() for qa in records])
    data.own = [
        qa
        for qa in found
        if qa.question not in taken
        and not _words(qa) & marks
        and not is_too_long(tokenizer, qa.question, qa.answer, max_length=config.max_length)
    ]
    if len(data.own) < count:
        logger.warning(
            "data.own_requests: %d of %d could be used; the others have no end, or touch what is "
            "to be forgotten.",
            len(data.own), count,
        )  # fmt: skip
    if data.own:
        save_records(path, data.own)


def _marks(forget: Sequence[QA], retain: Sequence[QA]) -> set[str]:
    counts, others = (
        Counter(word for qa in records for word in _words(qa)) for records in (forget, retain)
    )
    return {
        word
        for word, count in counts.items()
        if count >= 0.2 * len(forget) and others[word] <= 0.02 * len(retain)
    }


def _words(qa: QA) -> set[str]:
    return set(re.findall(r"\w+", normalise(f"{qa.question} {qa.answer}")))
