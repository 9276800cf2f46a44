"""Other answers that a model writes itself, for methods that teach them, such as AltPO."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nsru_kernels.nn.inputs import evaluating
from nsru_train.answering import generation_config
from nsru_train.config import DataConfig
from nsru_train.data.encode import encode_prompt, is_too_long, pad_token_id
from nsru_train.data.records import QA, normalise
from nsru_train.language_models import end_tokens, position_limit, refuse_encoder_decoder
from nsru_train.methods import Method
from nsru_train.shares import from_first
from nsru_train.sources import load_records, save_records

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

NEW_TOKENS = 200
ROUNDS = 3  # of sampling, until there are enough that can be used
_SHOTS = """\
Each question has an answer and another answer, which says something else in the same form.

Question: Where was the painter Elin Marsk born?
Answer: Elin Marsk was born in the harbour town of Vardø.
Another answer: Elin Marsk was born in the mining town of Falun.

Question: Which prize did Tomas Brede win in 1994?
Answer: In 1994 he won the Golden Lantern for his third novel.
Another answer: In 1994 he won the Silver Compass for his first play.

"""


def write_alternatives(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[QA],
    count: int,
    *,
    max_length: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> list[QA]:
    """The records, those without alternatives with ``count`` that the model wrote.

    It is shown two examples, the question and its answer, and sampled at temperature 1. Only the
    first line counts. What is empty, equals the answer or another alternative, or is too long is
    sampled again, at most three times; a record can end up with fewer, or with none.

    Args:
        count: alternatives of a record.
        max_length: most tokens of a question with an alternative.
        seed: of the sampling; the global random state is left as it was.

    Raises:
        ValueError: the examples leave no room for an answer in the model's position table.

    Source: Mekala et al. 2024, arXiv 2409.13474: five each, 200 tokens at most. Examples are ours.
    """
    from tqdm.auto import tqdm

    refuse_encoder_decoder(model, "data.write_alternatives")
    found, device = [], next(model.parameters()).device
    with evaluating(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for qa in tqdm(records, "alternatives", disable=not progress, leave=False):
            kept = {normalise(qa.answer): ""}
            for _ in range(0 if qa.alternatives else ROUNDS):
                for text in _samples(model, tokenizer, qa, count):
                    if not is_too_long(tokenizer, qa.question, text, max_length=max_length):
                        kept.setdefault(normalise(text), text)
                if len(kept) > count:
                    break
            own = tuple(text for text in kept.values() if text)[:count]
            found.append(replace(qa, alternatives=qa.alternatives or own))
    return found


def _samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, qa: QA, count: int
) -> Iterator[str]:
    text = f"{_SHOTS}Question: {qa.question}\nAnswer: {qa.answer}\nAnother answer:"
    ids = encode_prompt(tokenizer, text) if tokenizer.chat_template else tokenizer(text).input_ids
    limit = position_limit(model) or len(ids) + NEW_TOKENS
    if limit <= len(ids):
        raise ValueError(
            f"data.write_alternatives: the prompt takes {len(ids)} tokens, {type(model).__name__} "
            f"has {limit} positions; give records with alternatives of their own."
        )
    prompt = torch.tensor([ids] * count, device=next(model.parameters()).device)
    stop, pad = sorted(end_tokens(model)) or None, pad_token_id(tokenizer, model)
    new_tokens = min(NEW_TOKENS, limit - len(ids))
    with generation_config(model, new_tokens, stop, pad, do_sample=True):
        output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt))
    for text in tokenizer.batch_decode(output[:, len(ids) :], skip_special_tokens=True):
        line = re.split(r"\n|\b(?:Question|Q):", text.strip(), maxsplit=1)[0].strip()
        if line:
            yield line


def add_alternatives(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[QA],
    config: DataConfig,
    methods: Iterable[Method],
    path: Path,
    *,
    progress: bool = True,
) -> list[QA]:
    """Records to forget, with the alternatives that ``config`` wants where a method teaches some.

    They are kept in ``path``, from where a run that goes on reads them.

    Raises:
        ValueError: those in ``path`` are of other questions, or as `write_alternatives`.
    """
    count = config.write_alternatives
    if not count:
        return records
    if not any(method.alternatives for method in methods):
        logger.warning("data.write_alternatives has no effect: the method teaches no alternatives.")
        return records
    if path.exists():
        found = load_records(str(path))
        if [(qa.question, qa.answer) for qa in found] != [
            (qa.question, qa.answer) for qa in records
        ]:
            raise ValueError(
                f"data.write_alternatives: {path} was written for other questions; remove it, or "
                "give another folder."
            )
        return found
    found = from_first(
        write_alternatives(
            model, tokenizer, records, count, max_length=config.max_length, progress=progress
        )
    )
    if lacking := sum(len(qa.alternatives) < count for qa in found):
        logger.warning(
            "data.write_alternatives: %d of %d records have fewer than %d.",
            *(lacking, len(found), count),
        )
    save_records(path, found)
    return found
