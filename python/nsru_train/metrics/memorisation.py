"""Share of an answer that a model reproduces, token by token, fed the answer's own prefix."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def exact_memorisation(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Share of answer tokens that are the model's most likely next token, in [0, 1].

    Args:
        predictions: [n] token ids, argmax of the teacher-forced logits at each answer position.
        targets: [n] token ids of the answer, without EOS.

    Raises:
        ValueError: lengths differ or are zero.

    Source: Tirumala et al. 2022, arXiv 2205.10770.
    """
    return float(_hits("exact_memorisation", predictions, targets).mean())


def extraction_strength(predictions: ArrayLike, targets: ArrayLike) -> float:
    """1 - k/n: the share of the answer that follows from its first k tokens, with k the fewest.

    k is the smallest prefix length after which every teacher-forced argmax is right; then greedy
    decoding from there yields the rest of the answer. 1 means the question alone suffices, 0 that
    not even the last token follows. (OpenUnlearning lets k stop at n-1, so its floor is 1/n.)

    Args, Raises: as in `exact_memorisation`.

    Source: Carlini et al. 2021, arXiv 2012.07805; Wang et al. 2025, arXiv 2406.09179.
    """
    hits = _hits("extraction_strength", predictions, targets)
    misses = np.flatnonzero(~hits)
    k = misses[-1] + 1 if misses.size else 0
    return float((hits.size - k) / hits.size)


def _hits(metric: str, predictions: ArrayLike, targets: ArrayLike) -> np.ndarray:
    predicted, wanted = np.asarray(predictions), np.asarray(targets)
    if predicted.ndim != 1 or predicted.shape != wanted.shape:
        raise ValueError(
            f"{metric}: predictions and targets must be two lists of one length, got shapes "
            f"{predicted.shape} and {wanted.shape}."
        )
    if not wanted.size:
        raise ValueError(f"{metric}: the answer has no tokens before EOS.")
    return predicted == wanted
