"""TOFU's scores from logs of per-question losses: truth ratio, model utility, forget quality.

A log maps TOFU's file names (`LOG_FILES`) to four columns with one entry a question: avg_gt_loss,
avg_paraphrased_loss (nats per answer token, EOS included), average_perturb_loss (a list per
question, one loss a wrong answer) and rougeL_recall. A column is a list, or an object
{index: value} as in the logs of locuslab/tofu; entries of one index belong together.

Source: Maini et al. 2024 (TOFU), arXiv 2401.06121; aggregation as in locuslab/tofu.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from nsru_kernels.files import parse_json, read_text

Mean = Literal["geometric", "arithmetic"]
Log = Mapping[str, Mapping[str, Any]]

LOG_FILES = {
    "retain": "eval_log.json",
    "forget": "eval_log_forget.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
UTILITY_SPLITS = ("retain", "real_authors", "world_facts")
OPTION_SPLITS = ("real_authors", "world_facts")  # multiple choice: p is normalised by the options


class ModelUtility(float):
    """Model utility, a float that also says what it was made of.

    Attributes:
        splits: the splits that entered; only with all of `UTILITY_SPLITS` is it TOFU's number.
        scores: split -> {"probability", "rougeL_recall", "truth_ratio"}, the numbers averaged.
    """

    splits: tuple[str, ...] = ()
    scores: Mapping[str, Mapping[str, float]] = {}


class ForgetQuality(float):
    """p-value of the Kolmogorov-Smirnov test; `statistic` is its D, in [0, 1]."""

    statistic: float = float("nan")


def model_utility(
    log: Log, mean: Mean = "geometric", splits: Iterable[str] | None = None
) -> ModelUtility:
    """Harmonic mean of {probability, ROUGE-L recall, mean max(0, 1 - R)} over the given splits.

    Args:
        log: see the module.
        mean: how the wrong answers of one question average in the truth ratio R.
        splits: names out of `UTILITY_SPLITS`, all required; None takes those that the log holds.

    Returns:
        In [0, 1], 0 when any of the numbers is 0. `.splits` and `.scores` say what entered.

    Raises:
        ValueError: a split or column is missing, or its values are malformed.
    """
    names = _present(log) if splits is None else tuple(splits)
    if not names or not set(names) <= set(UTILITY_SPLITS):
        raise ValueError(
            f"model_utility: splits must be out of {', '.join(UTILITY_SPLITS)}, got {list(names)}."
        )
    scores = {name: _scores(log, name, mean) for name in names}
    utility = ModelUtility(
        harmonic_mean([value for row in scores.values() for value in row.values()])
    )
    utility.splits, utility.scores = names, scores
    return utility


def forget_quality(log: Log, retain_log: Log | None, mean: Mean = "geometric") -> ForgetQuality:
    """p-value of the two-sample KS test between truth ratios on the forget set; `.statistic` is D.

    High: the model cannot be told from one that never saw the forget set. Use log10 to compare.

    Args:
        log: of the unlearned model.
        retain_log: of a model trained on the retain data only, on the same forget questions.
        mean: as in `model_utility`.

    Raises:
        ValueError: retain_log is missing, the logs hold different numbers of forget questions, or
            a column is missing or malformed.
    """
    from scipy.stats import ks_2samp

    if retain_log is None:
        raise ValueError(
            "forget_quality: retain_log is missing; it needs the evaluation log of a model trained "
            "on the retain data only. Evaluate one on the same splits, or load a published log."
        )
    ratios = []
    for name, source in (("log", log), ("retain_log", retain_log)):
        columns = _columns(source, "forget", ("avg_paraphrased_loss", "average_perturb_loss"), name)
        # The test sees order alone, and the logarithm cannot overflow.
        ratios.append(
            _log_truth_ratio(columns["avg_paraphrased_loss"], columns["average_perturb_loss"], mean)
        )
    if len(ratios[0]) != len(ratios[1]):
        raise ValueError(
            f"forget_quality: log holds {len(ratios[0])} forget questions, retain_log "
            f"{len(ratios[1])}; both must come from the same forget set."
        )
    test = ks_2samp(*ratios)
    quality = ForgetQuality(test.pvalue)
    quality.statistic = float(test.statistic)
    return quality


def truth_ratio(
    paraphrased_loss: ArrayLike,
    perturbed_loss: Sequence[ArrayLike],
    mean: Mean = "geometric",
) -> np.ndarray:
    """R = mean_j exp(-ℓ_perturbed_j) / exp(-ℓ_paraphrased) for each question.

    Args:
        paraphrased_loss: [n] loss per token of the right answer in other words.
        perturbed_loss: [n] lists of losses per token of wrong answers; lengths may differ.
        mean: "geometric" (TOFU's results: exp of the mean loss) or "arithmetic" (legacy scripts).

    Returns:
        [n] float64, small when the model prefers the right answer.
    """
    with np.errstate(over="ignore"):  # a ratio beyond float64 is inf, which every score can take
        return np.exp(_log_truth_ratio(paraphrased_loss, perturbed_loss, mean))


def truth_ratio_score(ratio: np.ndarray, forget: bool) -> float:
    """mean max(0, 1 - R), or mean min(R, 1/R) on a forget set, where R = 1 is ignorance."""
    if forget:
        with np.errstate(divide="ignore"):
            return float(np.minimum(ratio, 1 / ratio).mean())
    return float(np.maximum(0, 1 - ratio).mean())


def option_probability(
    right_loss: Sequence[float] | np.ndarray, wrong_losses: Iterable[np.ndarray]
) -> np.ndarray:
    """p(right) / (p(right) + Σ p(wrong)) for each question, p = exp(-loss per token)."""
    return np.array(
        [
            1 / (1 + np.exp(np.clip(right - wrong, None, 700.0)).sum())
            for right, wrong in zip(right_loss, wrong_losses, strict=True)
        ]
    )


def load_log(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read a log: a JSON file in TOFU's shape, or a results.json of `nsru eval`.

    Raises:
        ValueError: no such file, not JSON, or without any of TOFU's file names.
    """
    path = Path(path)
    try:
        content = parse_json(read_text(path))
    except OSError as error:
        raise ValueError(f"log {path}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise ValueError(f"log {path}: not valid JSON ({error}).") from None
    log = content.get("log", content) if isinstance(content, Mapping) else None
    if not isinstance(log, Mapping) or not set(LOG_FILES.values()) & set(log):
        raise ValueError(
            f"log {path}: holds none of {', '.join(LOG_FILES.values())}; is it an evaluation log?"
        )
    return dict(log)


def load_reference(path: str | Path) -> tuple[float | None, Mapping[str, Any]]:
    """membership_auc and setup of a results.json of `nsru eval`, as far as it has them."""
    content = parse_json(read_text(path))
    parts = (
        content.get(key) if isinstance(content, Mapping) else None for key in ("metrics", "setup")
    )
    metrics, setup = (part if isinstance(part, Mapping) else {} for part in parts)
    auc = metrics.get("membership_auc")
    return auc if isinstance(auc, (int, float)) else None, setup


def check_retain_log(
    path: str | Path, splits: Mapping[str, Sequence[tuple[str, str]]], *, ratios: bool
) -> None:
    """Raise ValueError where a retain model's log lacks what is compared, or is of other questions.

    Args:
        path: as in `load_log`. A results.json holds the first questions of each split, too.
        splits: forget and holdout, as far as they are evaluated -> (question, answer)s.
        ratios: whether truth ratios are compared.
    """
    log, content = load_log(path), parse_json(read_text(path))
    examples, metrics = (content.get(key) for key in ("examples", "metrics"))
    counts = {
        split: row["count"]
        for split, row in (metrics.items() if isinstance(metrics, Mapping) else ())
        if isinstance(row, Mapping) and isinstance(row.get("count"), int)
    }
    if ratios:
        keys = ("avg_paraphrased_loss", "average_perturb_loss")
        counts["forget"] = len(_columns(log, "forget", keys, "retain_log")[keys[0]])
    for split, records in splits.items():
        first = [
            (row.get("question"), row.get("original"))
            for row in (examples if isinstance(examples, list) else ())
            if isinstance(row, Mapping) and row.get("split") == split
        ]
        count = counts.get(split, len(records))
        if count != len(records) or first != [*records[: len(first)]]:
            theirs = f", the first one {first[0][0]!r:.60}" if first else ""
            raise ValueError(
                f"retain_log: {path} is of another {split} set: {count} questions{theirs}, not "
                f"{len(records)}, the first one {records[0][0]!r:.60}. Give that of the same sets."
            )


def _present(log: Log) -> tuple[str, ...]:
    names = tuple(name for name in UTILITY_SPLITS if LOG_FILES[name] in log)
    if not names:
        wanted = ", ".join(LOG_FILES[name] for name in UTILITY_SPLITS)
        raise ValueError(f"model_utility: log holds none of {wanted}; found: {_keys(log)}.")
    return names


def _scores(log: Log, split: str, mean: Mean) -> dict[str, float]:
    keys = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")
    right, paraphrased, wrong, rouge = _columns(log, split, keys, "log").values()
    probability = option_probability(right, wrong) if split in OPTION_SPLITS else np.exp(-right)
    return {
        "probability": float(probability.mean()),
        "rougeL_recall": float(rouge.mean()),
        "truth_ratio": truth_ratio_score(truth_ratio(paraphrased, wrong, mean), forget=False),
    }


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean; 0 where a value is 0 or less."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def _log_truth_ratio(paraphrased: ArrayLike, perturbed: Any, mean: Mean) -> np.ndarray:
    if mean == "geometric":
        log_wrong = [-np.mean(losses) for losses in perturbed]
    elif mean == "arithmetic":
        log_wrong = [np.logaddexp.reduce(-np.asarray(x)) - np.log(len(x)) for x in perturbed]
    else:
        raise ValueError(f"mean must be 'geometric' or 'arithmetic', got {mean!r}.")
    return np.asarray(log_wrong) + np.asarray(paraphrased)


def _columns(log: Log, split: str, keys: Sequence[str], name: str) -> dict[str, Any]:
    """Checked columns of one split: arrays [n], or a list of n arrays for average_perturb_loss."""
    file = LOG_FILES[split]
    if file not in log:
        raise ValueError(f"{name} has no {file!r} (split {split}); found: {_keys(log)}.")
    if not isinstance(log[file], Mapping):
        raise ValueError(f"{name}[{file!r}] must be an object of columns, got {log[file]!r:.60}.")
    columns: dict[str, Any] = {}
    for key in keys:
        where = f"{name}[{file!r}][{key!r}]"
        if key not in log[file]:
            raise ValueError(f"{where} is missing; found: {_keys(log[file])}.")
        column = log[file][key]
        if isinstance(column, Sequence) and not isinstance(column, str):
            column = dict(enumerate(column))
        if not isinstance(column, Mapping) or not column:
            raise ValueError(f"{where} must be a non-empty list of numbers, got {column!r:.60}.")
        columns[key] = {str(index): value for index, value in column.items()}
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise ValueError(f"{name}[{file!r}]: columns have different lengths: {listed}.")
    indices = list(columns[keys[0]])
    for key, column in columns.items():
        where = f"{name}[{file!r}][{key!r}]"
        if odd := column.keys() ^ indices:
            raise ValueError(
                f"{where} and {keys[0]!r} have different indices, such as {min(odd)!r}; the "
                "questions cannot be paired."
            )
        if key == "average_perturb_loss":
            columns[key] = [_numbers(column[i], f"{where}[{i}]") for i in indices]
        else:
            values = [column[index] for index in indices]
            columns[key] = _numbers(values, where, upper=1 if key == "rougeL_recall" else None)
    return columns


def _numbers(values: Any, where: str, upper: float | None = None) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty((0, 0))
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{where} must be a non-empty list of numbers, got {str(values)[:60]}.")
    # Rounding may take the loss of a certain token a little below zero.
    bad = ~np.isfinite(array) | (array < -1e-4) | (array > (np.inf if upper is None else upper))
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        limits = "finite and not negative" if upper is None else f"in [0, {upper}]"
        raise ValueError(f"{where}[{at}] is {array[at]}, must be {limits}; did the model diverge?")
    return array


def _keys(mapping: Mapping[str, Any]) -> str:
    return ", ".join(map(str, mapping)) or "nothing"
