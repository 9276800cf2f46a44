"""Membership inference: can an attacker tell forgotten questions from ones never trained on?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def min_k(token_nll: ArrayLike, k: float = 0.4) -> float:
    """MIN-K%: mean log-probability of the ⌊k·n⌋ least likely tokens (at least one).

    Text seen in training has few surprising tokens, so a higher value means a likelier member.

    Args:
        token_nll: [n] negative log-likelihoods of the answer tokens, without EOS.
        k: share of the tokens, in (0, 1].

    Raises:
        ValueError: no tokens, a value that is not finite, or k out of range.

    Source: Shi et al. 2024, arXiv 2310.16789; k = 0.4 as in OpenUnlearning's TOFU and MUSE runs.
    """
    if not 0 < k <= 1:
        raise ValueError(f"min_k: k must be in (0, 1], got {k}.")
    nll = _finite("min_k", "token_nll", token_nll)
    count = max(1, int(k * nll.size))
    return float(-np.sort(nll)[-count:].mean())


def min_k_plus_plus(log_probs: ArrayLike, tokens: ArrayLike, k: float = 0.4) -> float:
    """`min_k` of (log p - μ) / σ: how likely a token is among what could stand in its place.

    μ and σ² are mean and variance of log p under p itself, σ² at least 1e-6 as in OpenUnlearning.

    Args:
        log_probs: [n, V] log-probabilities at each answer position, without EOS.
        tokens: [n] token ids of the answer.
        k: share of the tokens, in (0, 1].

    Raises:
        ValueError: as `min_k`.

    Source: Zhang et al. 2024, arXiv 2404.02936.
    """
    log_p = np.asarray(log_probs, dtype=np.float64)
    p = np.exp(log_p)
    weighted = p * np.where(p > 0, log_p, 0.0)
    mean = weighted.sum(-1)
    variance = (weighted * np.where(p > 0, log_p, 0.0)).sum(-1) - mean**2
    own = np.take_along_axis(log_p, np.asarray(tokens)[:, None], -1)[:, 0]
    return min_k((mean - own) / np.sqrt(np.maximum(variance, 1e-6)), k)


def membership_auc(member: ArrayLike, nonmember: ArrayLike) -> float:
    """P(member score > non-member score) + ½ P(equal): area under the attack's ROC curve.

    Args:
        member: scores of the forget questions, higher = likelier trained on (e.g. `min_k`).
        nonmember: scores of holdout questions, which were never trained on.

    Returns:
        1 when every forget question still looks trained on, 0.5 when the two cannot be told apart,
        below when the forget questions stand out as less likely than unseen ones.

    Raises:
        ValueError: one side is empty or holds a value that is not finite.
    """
    positive = _finite("membership_auc", "member", member)
    negative = np.sort(_finite("membership_auc", "nonmember", nonmember))
    below = np.searchsorted(negative, positive, side="left")
    not_above = np.searchsorted(negative, positive, side="right")
    return float((below + not_above).mean() / (2 * negative.size))


def privleak(auc: float, reference_auc: float = 0.5) -> float:
    """100 · ((1 - auc) - (1 - reference_auc)) / (1 - reference_auc), in percent.

    MUSE's AUC counts the share of pairs in which the *holdout* text looks more like a member,
    which is 1 - `membership_auc`. Near 0: like a model that never saw the forget set. Negative
    (-100 at worst): under-unlearned, still recognised as trained on. Positive: over-unlearned,
    recognised by being less likely than unseen text.

    Args:
        auc: `membership_auc` of the unlearned model.
        reference_auc: the same of a model trained on retain data only; 0.5 where there is none.

    Raises:
        ValueError: auc outside [0, 1], or reference_auc outside [0, 1).

    Source: Shi et al. 2024 (MUSE), arXiv 2407.06460, section 3.
    """
    if not 0 <= auc <= 1:
        raise ValueError(f"privleak: auc must be in [0, 1], got {auc}.")
    if not 0 <= reference_auc < 1:
        raise ValueError(
            f"privleak: reference_auc must be in [0, 1), got {reference_auc}. At 1 the reference "
            "model itself was trained on the forget set, or the holdout set differs in kind."
        )
    return 100 * (reference_auc - auc) / (1 - reference_auc)


def _finite(metric: str, name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{metric}: {name} must be a non-empty list, got shape {array.shape}.")
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{metric}: {name}[{at}] is {array[at]}; the model diverged.")
    return array
