"""OpenUnlearning's TOFU evaluation, recomputed from the items of its logs (TOFU_EVAL.json).

Its definitions, their 1e-10 included, not those of `nsru_train.metrics.tofu`, which are TOFU's own.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nsru_train.metrics.privacy import membership_auc
from nsru_train.metrics.text import rouge_l_recall, rouge_scores
from nsru_train.metrics.tofu import harmonic_mean

logger = logging.getLogger(__name__)

Log = Mapping[str, Any]

_SPLITS = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
# Truth ratio -> set, whether its right answer is a paraphrase, and how the items become one number.
_TRUTH_RATIOS: dict[str, tuple[str, bool, Callable[[np.ndarray], np.ndarray]]] = {
    "forget_truth_ratio": ("forget", True, lambda tr: np.minimum(tr, 1 / (tr + 1e-10))),
    "retain_Truth_Ratio": ("retain", True, lambda tr: np.maximum(0, 1 - tr)),
    "ra_Truth_Ratio": ("ra", False, lambda tr: np.maximum(0, 1 - tr)),
    "wf_Truth_Ratio": ("wf", False, lambda tr: np.maximum(0, 1 - tr)),
}
_UTILITY = tuple(
    f"{name}_{metric}"
    for name in ("retain", "ra", "wf")
    for metric in ("Q_A_Prob" + "_normalised" * (name != "retain"), "Q_A_ROUGE", "Truth_Ratio")
)
_ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus", "gradnorm", "reference")


def aggregates(log: Log, retain_log: Log | None = None) -> dict[str, float]:
    """Every number of a log that follows from its items, under OpenUnlearning's own names.

    Args:
        log: the content of a TOFU_EVAL.json; aggregates in it are not read.
        retain_log: that of a model trained on the retain data alone, for forget_quality and
            privleak. Without it privleak is against an AUC of 0.5, with a warning.

    Returns:
        {metric: value} of those metrics whose items ``log`` holds. ROUGE is computed from the
        texts, truth ratios from the losses. "memorization" is the harmonic mean of 1 - extraction
        strength, 1 - exact memorization, 1 - paraphrase probability and 1 - the mean share of
        p(right) in p(right) + p(wrong), which gives the values in the paper (arXiv 2506.12618).

    Raises:
        ValueError: a metric's items are missing, malformed, or of other questions than those that
            belong to them.
    """
    found: dict[str, float] = {}
    for name in ("exact_memorization", "extraction_strength"):
        if name in log:
            found[name] = float(_column(log, name, "score").mean())
    for name in log:
        if name.endswith("_Prob"):
            found[name] = float(np.mean([np.exp(-losses).mean() for losses in _losses(log, name)]))
        elif name.endswith("_ROUGE"):
            found[name] = float(np.mean(list(rouge_recalls(log, name).values())))
    for name in ("ra", "wf"):
        if f"{name}_Q_A_Prob" in log and f"{name}_Q_A_PERT_Prob" in log:
            right = np.exp(-np.concatenate(_losses(log, f"{name}_Q_A_Prob")))
            wrong = _losses(log, f"{name}_Q_A_PERT_Prob", like=f"{name}_Q_A_Prob")
            total = right + np.array([np.exp(-losses).sum() for losses in wrong]) + 1e-10
            found[f"{name}_Q_A_Prob_normalised"] = float((right / total).mean())
    for name, (_, _, score) in _TRUTH_RATIOS.items():
        if name in log:
            found[name] = float(score(truth_ratios(log, name)).mean())
    for attack in _ATTACKS:
        if f"mia_{attack}" in log:
            found[f"mia_{attack}"] = _attack_auc(log, attack)
    if all(name in found for name in _UTILITY):
        found["model_utility"] = harmonic_mean([found[name] for name in _UTILITY])
    if "mia_min_k" in found:
        reference = 0.5
        if retain_log is None:
            logger.warning(
                "privleak is against an AUC of 0.5, at which a model that never saw the forget set "
                "scores other than 0; give its log as retain_log."
            )
        else:
            reference = _attack_auc(retain_log, "min_k")
        left, wanted = 1 - found["mia_min_k"], 1 - reference
        found["privleak"] = 100 * (left - wanted) / (wanted + 1e-10)
    if retain_log is not None and "forget_truth_ratio" in log:
        from scipy.stats import ks_2samp

        ratios = (truth_ratios(one, "forget_truth_ratio") for one in (log, retain_log))
        found["forget_quality"] = float(ks_2samp(*ratios).pvalue)
    remembered = ("extraction_strength", "exact_memorization", "forget_Q_A_PARA_Prob")
    if all(name in found for name in (*remembered, "forget_truth_ratio")):
        shares = 1 / (1 + truth_ratios(log, "forget_truth_ratio"))
        parts = [*(found[name] for name in remembered), float(shares.mean())]
        found["memorization"] = harmonic_mean([1 - part for part in parts])
    return found


def to_log(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], retain_log: Log | None = None
) -> dict[str, Any]:
    """What `evaluate` found, as the content of a TOFU_EVAL.json, with every aggregate.

    Left out are the attacks that need more than an answer's losses: min-k++, gradnorm, reference.

    Args:
        rows: ``Evaluation.rows``: split -> a row for each question.
        retain_log: as in `aggregates`.
    """
    log: dict[str, Any] = {}

    def add(name: str, values: Sequence[Mapping[str, Any]]) -> None:
        log[name] = {"value_by_index": {str(i): dict(value) for i, value in enumerate(values)}}

    for split, group in _SPLITS.items():
        own = rows.get(split, ())
        if not own:
            continue
        losses = {"Prob": [row["loss"] for row in own]}
        if all("perturbed_loss" in row for row in own):
            losses["PERT_Prob"] = [row["perturbed_loss"] for row in own]
            if group in ("forget", "retain"):
                losses["PARA_Prob"] = [row["paraphrased_loss"] for row in own]
        for name, values in losses.items():
            pairs = ((value, np.exp(-np.asarray(value)).tolist()) for value in values)
            add(f"{group}_Q_A_{name}", [{"prob": prob, "avg_loss": loss} for loss, prob in pairs])
        if "PERT_Prob" in losses:
            ratio = next(name for name, (of, *_) in _TRUTH_RATIOS.items() if of == group)
            log[ratio] = {}
            add(ratio, [{"score": float(value)} for value in truth_ratios(log, ratio)])
        if all("generated" in row for row in own):
            texts = [(row["question"], row["answer"], row["generated"]) for row in own]
            add(
                f"{group}_Q_A_ROUGE",
                [
                    {**rouge_scores(right, said), "input": question, "ground_truth": right,
                     "generation": said}
                    for question, right, said in texts
                ],
            )  # fmt: skip
    forget, holdout = rows.get("forget", ()), rows.get("holdout", ())
    if forget:
        # OpenUnlearning's search ends at the last token, also where that is wrong.
        strengths = [max(r["extraction_strength"], 1 / r["answer_tokens"]) for r in forget]
        add("extraction_strength", [{"score": value} for value in strengths])
        add("exact_memorization", [{"score": row["exact_memorisation"]} for row in forget])
    if forget and holdout:
        for attack in ("loss", "zlib", "min_k"):
            log[f"mia_{attack}"] = {
                part: {"value_by_index": {str(i): {"score": v} for i, v in enumerate(values)}}
                for part, values in (
                    ("forget", _attack_scores(attack, forget)),
                    ("holdout", _attack_scores(attack, holdout)),
                )
            }
    for name, value in aggregates(log, retain_log).items():
        log.setdefault(name, {})["agg_value"] = value
    return log


def summary(log: Log) -> dict[str, float]:
    """The aggregates of a log alone: the content of a TOFU_SUMMARY.json."""
    return {name: content["agg_value"] for name, content in log.items() if "agg_value" in content}


def _attack_scores(attack: str, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    if attack == "min_k":
        return [-row["min_k"] for row in rows]
    losses = [row["loss"] for row in rows]
    if attack == "loss":
        return losses
    return zlib_scores(losses, [row["answer"] for row in rows]).tolist()


def truth_ratios(log: Log, name: str) -> np.ndarray:
    """p(wrong) / (p(right) + 1e-10) of each question, p by mean losses: [n] float64.

    Args:
        name: of the metric, such as "forget_truth_ratio".
    """
    group, paraphrased, _ = _TRUTH_RATIOS[name]
    source = f"{group}_Q_A_{'PARA_' * paraphrased}Prob"
    right = np.exp(-np.concatenate(_losses(log, source)))
    wrong = _losses(log, f"{group}_Q_A_PERT_Prob", like=source)
    return np.exp([-losses.mean() for losses in wrong]) / (right + 1e-10)


def rouge_recalls(log: Log, name: str) -> dict[str, float]:
    """ROUGE-L recall of each generation against its ground truth, by the item's index."""
    return {
        index: rouge_l_recall(
            _value(item, "ground_truth", str, name, index),
            _value(item, "generation", str, name, index),
        )
        for index, item in _items(log, name).items()
    }


def zlib_scores(losses: Sequence[float], texts: Sequence[str]) -> np.ndarray:
    """A token's mean loss / bytes of the compressed answer, [n]: the scores of mia_zlib."""
    sizes = [len(zlib.compress(text.encode())) for text in texts]
    return np.asarray(losses) / np.array(sizes)


def _attack_auc(log: Log, attack: str) -> float:
    """Probability that a held-out question scores above one of the forget set."""
    name = f"mia_{attack}"
    if not isinstance(log.get(name), Mapping):
        raise ValueError(f"log[{name!r}] is missing, or no object of forget and holdout.")
    forget, holdout = (
        _column(log[name], part, "score", f"{name}.{part}") for part in ("forget", "holdout")
    )
    # The attack's scores are losses; membership_auc's are the higher the more likely a member.
    return membership_auc(-forget, -holdout)


def _items(log: Log, name: str, where: str = "") -> Mapping[str, Any]:
    found = log.get(name)
    items = found.get("value_by_index") if isinstance(found, Mapping) else None
    if not isinstance(items, Mapping) or not items:
        raise ValueError(
            f"log[{where or name!r}] must hold items under 'value_by_index', got {found!r:.60}."
        )
    return items


def _value(item: Any, key: str, kind: Any, name: str, index: str) -> Any:
    value = item.get(key) if isinstance(item, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"log[{name!r}][{index!r}] has no {key}, got {item!r:.60}.")
    return value


def _column(log: Log, name: str, key: str, where: str = "") -> np.ndarray:
    items = _items(log, name, where)
    values = [_value(v, key, (int, float), where or name, i) for i, v in items.items()]
    found = np.array(values, dtype=np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"log[{where or name!r}] has {key} that are not finite.")
    return found


def _losses(log: Log, name: str, like: str | None = None) -> list[np.ndarray]:
    """Mean losses of each question's answers, one or several, in the order of metric ``like``."""
    items = _items(log, name)
    order = list(items) if like is None else list(_items(log, like))
    if set(order) != set(items):
        raise ValueError(f"log[{name!r}] and log[{like!r}] are of different questions.")
    found = []
    for index in order:
        value = _value(items[index], "avg_loss", (int, float, list), name, index)
        try:
            losses = np.atleast_1d(np.asarray(value, dtype=np.float64))
        except (TypeError, ValueError):
            losses = np.array([np.nan])
        if not losses.size or losses.ndim != 1 or not np.isfinite(losses).all():
            raise ValueError(f"log[{name!r}][{index!r}] has no finite avg_loss, got {value!r:.60}.")
        found.append(losses)
    return found
