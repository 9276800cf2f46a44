"""OpenUnlearning's TOFU evaluation, recomputed from the items of its logs (TOFU_EVAL.json).

Its definitions, their 1e-10 included, not those of `nsru_train.metrics.tofu`, which are TOFU's own.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nsru_kernels.files import read_json
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
# Their name -> that of the same number in the rows of `nsru compare`.
_COMPARED = {
    "forget_Q_A_Prob": "forget_prob",
    "forget_Q_A_ROUGE": "forget_rougeL_recall",
    "forget_truth_ratio": "forget_truth_ratio",
    "extraction_strength": "forget_extraction_strength",
    "exact_memorization": "forget_exact_memorisation",
    "retain_Q_A_Prob": "retain_prob",
    "retain_Q_A_ROUGE": "retain_rougeL_recall",
    "retain_Truth_Ratio": "retain_truth_ratio",
    "mia_min_k": "membership_auc",
    **{name: name for name in ("privleak", "privacy", "forget_quality")},
    **{name: name for name in ("model_utility", "memorization")},
}
_OF_RETAIN_LOG = ("privleak", "privacy", "forget_quality")


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
        "privacy", whose formula there is not public, is ours: over the attacks that both logs have,
        but the one with a reference model, the harmonic mean of
        1 - |AUC - AUC_retain| / max(AUC_retain, 1 - AUC_retain), 1 where an attacker sees the
        retain model and 0 where he can see no more of a difference.

    Raises:
        ValueError: a metric's items are missing, malformed, or of other questions than those that
            belong to them, or the retain log is of another forget set.
    """
    if retain_log is not None:
        check_retain_log(retain_log, texts(log, "forget"))
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
            found[f"mia_{attack}"] = attack_auc(log, attack)
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
            reference = attack_auc(retain_log, "min_k")
        found["privleak"] = rel_diff(1 - found["mia_min_k"], 1 - reference)
    if retain_log is not None and "forget_truth_ratio" in log:
        from scipy.stats import ks_2samp

        ratios = (truth_ratios(one, "forget_truth_ratio") for one in (log, retain_log))
        found["forget_quality"] = float(ks_2samp(*ratios).pvalue)
    retained = retain_log or {}
    references = {
        attack: attack_auc(retained, attack)
        for attack in _ATTACKS
        # That one's own reference model is not the retain log's: two of them cannot be compared.
        if attack != "reference" and f"mia_{attack}" in found and f"mia_{attack}" in retained
    }
    if references:
        found["privacy"] = harmonic_mean(
            [
                1 - abs(found[f"mia_{attack}"] - auc) / max(auc, 1 - auc)
                for attack, auc in references.items()
            ]
        )
    remembered = ("extraction_strength", "exact_memorization", "forget_Q_A_PARA_Prob")
    if all(name in found for name in (*remembered, "forget_truth_ratio")):
        shares = 1 / (1 + truth_ratios(log, "forget_truth_ratio"))
        parts = [*(found[name] for name in remembered), float(shares.mean())]
        found["memorization"] = harmonic_mean([1 - part for part in parts])
    _check_items(log)
    return found


def rel_diff(value: float, reference: float) -> float:
    """The distance of a number from the retain model's, in percent of that.

    privleak is the same of 1 - AUC."""
    return 100 * (value - reference) / (reference + 1e-10)


def find_log(path: str | Path, name: str, argument: str) -> Path:
    """The file of an evaluation by OpenUnlearning, which ``path`` is or holds under its name.

    Raises:
        ValueError: there is none; the message names the argument.
    """
    file = Path(path, name) if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"{argument}: no file {file}; give a folder with OpenUnlearning's {name}.")
    return file


def read_log(path: str | Path) -> dict[str, Any]:
    """A TOFU_EVAL.json, by its path or that of its folder.

    Raises:
        ValueError: there is none, or it holds no metric.
    """
    path = find_log(path, "TOFU_EVAL.json", "log")
    log = read_json(path)
    if not any(isinstance(content, Mapping) for content in log.values()):
        raise ValueError(f"log: {path} holds no metric of OpenUnlearning, got {[*log]!r:.60}.")
    return log


def texts(log: Log, split: str) -> list[tuple[str, str]]:
    """(prompt, right answer) of a split's questions, in the order of their indices.

    Empty where the log has no generations, which alone hold the texts."""
    name = f"{_SPLITS[split]}_Q_A_ROUGE"
    items = _items(log, name).items() if name in log else ()
    return [
        tuple(_value(item, key, str, name, index) for key in ("input", "ground_truth"))
        for index, item in sorted(items, key=lambda pair: (len(pair[0]), pair[0]))
        if isinstance(item, Mapping) and "input" in item
    ]


def same_questions(log: Log, split: str, records: Sequence[tuple[str, str]]) -> bool | None:
    """True where a split of a log is of these (question, answer)s; None where it has no texts.

    A prompt may stand around a question. White space does not count: tokenizers clean it up.
    """
    found = texts(log, split)
    if not found or not records:
        return None

    def same(one: tuple[str, str], other: tuple[str, str]) -> bool:
        asked, answer = ("".join(text.split()) for text in one)
        wanted, right = ("".join(text.split()) for text in other)
        return answer == right and (wanted in asked or asked in wanted)

    return len(found) == len(records) and all(map(same, found, records))


def check_retain_log(
    retain_log: Log,
    forget: Sequence[tuple[str, str]],
    *,
    ratios: bool = False,
    holdout: int = 0,
) -> None:
    """Raise ValueError where a retain log lacks what is compared, or is of other questions.

    Args:
        forget: (question, answer) of the forget set that is evaluated; empty where not known.
        ratios: whether its truth ratios are compared.
        holdout: number of questions beside the forget set in attacks on membership.
    """
    try:
        if ratios:
            truth_ratios(retain_log, "forget_truth_ratio")
        if holdout:
            attack_auc(retain_log, "min_k")
        counts = {"forget": len(forget), "holdout": holdout} if holdout else {}
        for part, count in counts.items() if "mia_loss" in retain_log else ():
            found = len(_items(retain_log["mia_loss"], part, f"mia_loss.{part}"))
            if found != count:
                raise ValueError(f"log['mia_loss'] has {found} {part} questions, not {count}.")
    except ValueError as error:
        raise ValueError(f"retain_log: {error} Give that of the same splits.") from error
    if same_questions(retain_log, "forget", forget) is False:
        theirs = texts(retain_log, "forget")
        raise ValueError(
            f"retain_log is of another forget set: {len(theirs)} questions, the first one "
            f"{theirs[0][0][-60:]!r}, not {len(forget)}, the first one {forget[0][0][-60:]!r}. "
            "Give the log of the same split."
        )
    try:
        _check_items(retain_log)
    except ValueError as error:
        raise ValueError(f"retain_log: {error} It is damaged, or was cut.") from error


def comparison_row(log: Log, records: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, float]:
    """A log's numbers under the names of ``nsru compare``, where the questions are the same.

    privleak and forget_quality are the log's own, for they need its retain log.

    Args:
        records: split -> (question, answer) of what is compared; those of "retain" are left out
            where the log is of others.

    Raises:
        ValueError: it is of another forget set, its aggregates do not follow from its items, or as
            `aggregates`.
    """
    if same_questions(log, "forget", records["forget"]) is False:
        raise ValueError(
            f"it is of another forget set: {len(texts(log, 'forget'))} questions, the first one "
            f"{texts(log, 'forget')[0][0][-60:]!r}"
        )
    found = aggregates(log)
    for name, said in summary(log).items():
        if said is None or name not in (*found, *_OF_RETAIN_LOG):
            continue
        if not isinstance(said, (int, float)):
            raise ValueError(f"its {name} is no number, got {said!r:.60}")
        if name in _OF_RETAIN_LOG:
            found[name] = said
        elif not abs(said - found[name]) <= 1e-5:
            raise ValueError(f"its {name} says {said}, its items give {found[name]}; it is damaged")
    own = same_questions(log, "retain", records["retain"])
    return {
        ours: found[theirs]
        for theirs, ours in _COMPARED.items()
        if theirs in found and (own or not ours.startswith("retain_"))
    }


def to_log(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], retain_log: Log | None = None
) -> dict[str, Any]:
    """The findings of `evaluate` as the content of a TOFU_EVAL.json, with every aggregate.

    Left out are attacks that the rows do not allow: min-k++ and gradnorm need what
    `nsru_train.membership` adds, the reference attack the losses of the retain log's model.

    Args:
        rows: ``Evaluation.rows``: split -> a row for each question.
        retain_log: as in `aggregates`.
    """
    forget, holdout = rows.get("forget", ()), rows.get("holdout", ())
    if retain_log is not None:
        check_retain_log(
            retain_log,
            [(row["question"], row["answer"]) for row in forget],
            ratios=bool(forget) and all("perturbed_loss" in row for row in forget),
            holdout=len(holdout),
        )
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
    if forget:
        # OpenUnlearning's search ends at the last token, also where that is wrong.
        strengths = [max(r["extraction_strength"], 1 / r["answer_tokens"]) for r in forget]
        add("extraction_strength", [{"score": value} for value in strengths])
        add("exact_memorization", [{"score": row["exact_memorisation"]} for row in forget])
    for attack in _ATTACKS if forget and holdout else ():
        scores = {
            part: _attack_scores(attack, own, part, retain_log)
            for part, own in (("forget", forget), ("holdout", holdout))
        }
        if all(scores.values()):
            log[f"mia_{attack}"] = {
                part: {"value_by_index": {str(i): {"score": v} for i, v in enumerate(values)}}
                for part, values in scores.items()
            }
    for name, value in aggregates(log, retain_log).items():
        log.setdefault(name, {})["agg_value"] = value
    return log


def summary(log: Log) -> dict[str, float]:
    """The aggregates of a log alone: the content of a TOFU_SUMMARY.json."""
    return {
        name: content["agg_value"]
        for name, content in log.items()
        if isinstance(content, Mapping) and "agg_value" in content
    }


def _attack_scores(
    attack: str, rows: Sequence[Mapping[str, Any]], part: str, retain_log: Log | None
) -> list[float]:
    """The attack's score of each row, none where it cannot be said of them."""
    losses = [row["loss"] for row in rows]
    if attack == "zlib":
        return zlib_scores(losses, [row["answer"] for row in rows]).tolist()
    if attack == "reference":
        if retain_log is None or "mia_loss" not in retain_log:
            return []
        reference = _column(retain_log["mia_loss"], part, "score", f"mia_loss.{part}")
        return (np.array(losses) - reference).tolist()
    sign = -1 if attack.startswith("min_k") else 1
    return [sign * row[attack] for row in rows if attack in row]


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


def attack_auc(log: Log, attack: str) -> float:
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


def _check_items(log: Log) -> None:
    """Raise ValueError where a metric lacks an item that another one of its set has."""
    seen: dict[str, tuple[str, set[str]]] = {}
    for name, content in log.items():
        parts = ("forget", "holdout") if name.startswith("mia_") else ("",)
        for part in parts if isinstance(content, Mapping) else ():
            held = content.get(part) if part else content
            group = part or (name.split("_")[0] if "_Q_A_" in name else "forget")
            if not isinstance(held, Mapping) or "value_by_index" not in held or "ruth" in name:
                continue  # truth ratios follow from other items
            items = set(held["value_by_index"])
            first, wanted = seen.setdefault(group, (name, items))
            if odd := sorted(wanted ^ items):
                raise ValueError(
                    f"log[{first!r}] and log[{name!r}] are of different questions: {odd[0]!r} is "
                    f"missing in one of them ({len(wanted)} and {len(items)} {group} items)."
                )


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
