"""Overlap of a generated answer with a reference text."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any


def rouge_l_recall(reference: str, prediction: str) -> float:
    """Longest common subsequence of stemmed words / words of the reference, in [0, 1].

    Words are runs of a-z and 0-9 after lower-casing, as in TOFU's scores: a reference in another
    script has none and scores 0.

    Source: Lin 2004 (ROUGE), as implemented by the rouge_score package with its Porter stemmer.

    Examples:
        >>> rouge_l_recall("He was born in Quito.", "Born in Quito")
        0.6
    """
    return rouge_scores(reference, prediction)["rougeL_recall"]


def rouge_scores(reference: str, prediction: str) -> dict[str, float]:
    """rouge1_recall, rougeL_f1 and rougeL_recall, as `rouge_l_recall` reads words."""
    found = _scorer(True).score(reference, prediction)
    return {
        "rouge1_recall": float(found["rouge1"].recall),
        "rougeL_f1": float(found["rougeL"].fmeasure),
        "rougeL_recall": float(found["rougeL"].recall),
    }


def has_words(reference: str) -> bool:
    """True where ``reference`` has a word by which `rouge_l_recall` could find it again."""
    return re.search("[a-z0-9]", reference.lower()) is not None


def rouge_l_f1(reference: str, prediction: str, *, stemmer: bool = True) -> float:
    """F-measure of `rouge_l_recall` and its precision; without stemmer words count as they are."""
    return float(_scorer(stemmer).score(reference, prediction)["rougeL"].fmeasure)


@lru_cache
def _scorer(stemmer: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=stemmer)
