"""Question-answer records, safe targets and their token encoding."""

from nsru_train.data.encode import (
    Encoded,
    TextFormat,
    collate,
    encode_prompt,
    encode_qa,
    length_batches,
    use_format,
)
from nsru_train.data.records import QA, check_disjoint, tofu_authors
from nsru_train.data.safe_targets import SafeTargets

__all__ = [
    "QA",
    "Encoded",
    "SafeTargets",
    "TextFormat",
    "check_disjoint",
    "collate",
    "encode_prompt",
    "encode_qa",
    "length_batches",
    "tofu_authors",
    "use_format",
]
