"""Question-answer records, fictitious authors, safe targets and their token encoding."""

from nsru_train.data.authors import Author, AuthorSplits, author_splits, make_authors
from nsru_train.data.encode import Encoded, collate, encode_prompt, encode_qa, length_batches
from nsru_train.data.records import QA, check_disjoint, load_records, tofu_authors
from nsru_train.data.safe_targets import SafeTargets

__all__ = [
    "QA",
    "Author",
    "AuthorSplits",
    "Encoded",
    "SafeTargets",
    "author_splits",
    "check_disjoint",
    "collate",
    "encode_prompt",
    "encode_qa",
    "length_batches",
    "load_records",
    "make_authors",
    "tofu_authors",
]
