"""Question-answer records, safe targets and their token encoding."""

from nsru_train.data.encode import Encoded, collate, encode_prompt, encode_qa, length_batches
from nsru_train.data.records import QA, check_disjoint, tofu_authors
from nsru_train.data.safe_targets import SafeTargets

__all__ = [
    "QA",
    "Encoded",
    "SafeTargets",
    "check_disjoint",
    "collate",
    "encode_prompt",
    "encode_qa",
    "length_batches",
    "tofu_authors",
]
