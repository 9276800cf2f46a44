"""Items of OpenUnlearning's datasets as sequences of ours."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from nsru_train.data.encode import IGNORE_INDEX, Encoded
from nsru_train.data.records import QA
from nsru_train.data.safe_targets import SafeTargets

logger = logging.getLogger(__name__)


def encode(dataset: Any, name: str) -> dict[int, Encoded]:
    """Index → sequence of one of their datasets, as its handler and the template write it.

    Items without a token to train are left out with a line that says how many.

    Raises:
        ValueError: none is left, or an item holds several answers.
    """
    found = {}
    for index in range(len(dataset)):
        item = dataset[index]
        item = item.get("original", item)
        if "labels" not in item:
            raise ValueError(
                f"data.{name}: an item holds {', '.join(map(str, item))} where labels were "
                "expected; give a dataset with one answer to each question."
            )
        if (item["labels"] != IGNORE_INDEX).any():
            found[index] = _encoded(item)
    if not found:
        raise ValueError(f"data.{name}: no item has a token to train; give another split.")
    if missing := len(dataset) - len(found):
        logger.warning(
            "data.%s: %d of %d items have no token to train, as where the prompt's tokens go on "
            "in the answer, and are left out.",
            *(name, missing, len(dataset)),
        )
    return found


def encode_safe(
    dataset: Any, indices: Iterable[int], templates: SafeTargets, draws: int
) -> list[list[Encoded]]:
    """The answers that are taught instead: the dataset's alternate, else a safe target.

    Args:
        draws: of an alternate, which QAwithIdkDataset draws anew at each access.

    Raises:
        ValueError: the dataset has no questions, or gives no answers to forget.
    """
    if getattr(dataset, "return_original", True) is False:
        raise ValueError("data.forget: return_original must be true, for the answers to forget.")
    if not hasattr(dataset, "question_key"):
        raise ValueError(
            f"data.forget: {type(dataset).__name__} has no questions that could be answered "
            "otherwise; take a method that teaches no other answer, such as NSRU_npo."
        )

    def safe(index: int) -> list[Encoded]:
        if "alternate" in dataset[index]:
            return [_encoded(dataset[index]["alternate"]) for _ in range(draws)]
        row = dataset.data[index]
        qa = QA(row[dataset.question_key], row[dataset.answer_key])
        item = dataset._process_sample(question=qa.question, answer=templates.target(qa))
        return [_encoded(item)]

    return [safe(index) for index in indices]


def _encoded(item: Mapping[str, Any]) -> Encoded:
    start = int((item["labels"] != IGNORE_INDEX).nonzero()[0])
    return Encoded(item["input_ids"].tolist(), start)
