"""Robustness, the share of a number that survives an attack, in OpenUnlearning's symmetric form.

Source: Dorna et al. 2025, arXiv 2506.12618, section on meta-evaluation; the paper cuts its ratios
at 1, the symmetric form punishes a change in either direction alike.
"""

from __future__ import annotations


def stability(before: float, after: float) -> float:
    """1 - |before - after| / (|before| + |after|), in [0, 1]; 1 where both are 0.

    For attacks that teach nothing, such as quantisation: what was forgotten should stay so.
    """
    return _share(before - after, abs(before) + abs(after))


def relearning_robustness(
    before: float, after: float, retain_before: float, retain_after: float
) -> float:
    """1 - |Δ - Δ_retain| / (|Δ| + |Δ_retain|), in [0, 1]: Δ is what relearning changes.

    1 where the model learns as a model trained on the retain data alone does, which never knew; 0
    where that learns nothing of it, or the other way. 1 where neither learns.
    """
    own, retain = after - before, retain_after - retain_before
    return _share(own - retain, abs(own) + abs(retain))


def _share(difference: float, whole: float) -> float:
    return 1 - abs(difference) / whole if whole else 1.0
