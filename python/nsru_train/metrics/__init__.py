"""Metrics of forgetting and retention, computed from per-question and per-token numbers alone."""

from nsru_train.metrics.memorisation import exact_memorisation, extraction_strength
from nsru_train.metrics.privacy import membership_auc, min_k, min_k_plus_plus, privleak
from nsru_train.metrics.text import rouge_l_recall
from nsru_train.metrics.tofu import (
    ForgetQuality,
    ModelUtility,
    forget_quality,
    load_log,
    model_utility,
    truth_ratio,
)

__all__ = [
    "ForgetQuality",
    "ModelUtility",
    "exact_memorisation",
    "extraction_strength",
    "forget_quality",
    "load_log",
    "membership_auc",
    "min_k",
    "min_k_plus_plus",
    "model_utility",
    "privleak",
    "rouge_l_recall",
    "truth_ratio",
]
