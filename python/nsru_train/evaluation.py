"""Evaluation of a model: what it forgot, what it kept, and what it says instead.

Every distinct sequence goes through the model once, whatever number of metrics needs it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from nsru_train.answering import answer_share, greedy_answers
from nsru_train.data.encode import Encoded, encode_qa
from nsru_train.data.records import QA, shared_questions
from nsru_train.data.safe_targets import SafeTargets
from nsru_train.eval_results import (
    EXAMPLES_PER_SPLIT,
    METRICS,
    Evaluation,
    Row,
    format_table,
    to_results,
)
from nsru_train.guard import without_update
from nsru_train.methods.method import Method
from nsru_train.metrics.memorisation import exact_memorisation, extraction_strength
from nsru_train.metrics.privacy import membership_auc, min_k, privleak
from nsru_train.metrics.text import has_words, rouge_l_recall
from nsru_train.metrics.tofu import (
    LOG_FILES,
    OPTION_SPLITS,
    UTILITY_SPLITS,
    Log,
    Mean,
    forget_quality,
    model_utility,
    option_probability,
    truth_ratio,
    truth_ratio_score,
)
from nsru_train.scoring import Score, quick_probabilities, score_share
from nsru_train.shares import Shares

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "SPLITS",
    "Evaluation",
    "add_base_answers",
    "before_and_after",
    "evaluate",
    "format_table",
    "probability_sets",
    "quick_probabilities",
    "to_results",
]

# Tokens of a KV cache for each token of a scored batch. 17 rows take a step of SmolLM2-135M on one
# core of a CPU as long as 32 do, 64 twice as long, and few caches are ever filled to the end.
_CACHED = 4
SPLITS = ("forget", "retain", "retain_unseen", "holdout", "real_authors", "world_facts")


def probability_sets(
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Sequence[QA]],
    safe: SafeTargets,
    *,
    max_length: int = 512,
    limit: int | None = None,
) -> dict[str, list[Encoded]]:
    """Encoded answers for `quick_probabilities`: SPLIT_prob for each split, and safe_prob.

    Args:
        tokenizer: of the model.
        splits: name -> records, as `Data.splits` gives them; safe_prob is of the safe targets of
            "forget", where that is there.
        safe: where the safe targets come from.
        max_length: most tokens of a question with its answer.
        limit: most questions of a split, taken at even distances; None takes all.

    Returns:
        SPLIT_prob -> encoded questions with their answers.

    Raises:
        ValueError: a sequence is too long.
    """
    pairs = {
        f"{name}_prob": [(qa.question, qa.answer) for qa in spread(records, limit)]
        for name, records in splits.items()
    }
    if "forget" in splits:
        forget = spread(splits["forget"], limit)
        pairs["safe_prob"] = [(qa.question, safe.target(qa)) for qa in forget]
    return {
        name: [encode_qa(tokenizer, *pair, max_length=max_length) for pair in found]
        for name, found in pairs.items()
    }


def watched(method: Method, sets: Mapping[str, list[Encoded]]) -> dict[str, list[Encoded]]:
    """``sets`` of `probability_sets` and what else the method chooses the step to keep by."""
    more = {"retain_accuracy": sets["retain_prob"]} if method.keeps_best else {}
    return {**sets, **more}


def before_and_after(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Encoded]],
    *,
    progress: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean answer probabilities without the adapters or the guard of ``model``, and with them.

    Args:
        model: after `unlearn`, or any with adapters.
        tokenizer: of the model.
        sets: from `probability_sets`.
        progress: show progress bars.

    Returns:
        Two dicts with the keys of ``sets``: means over answers of exp(-mean NLL of their tokens,
        EOS included), 0 to 1.
    """
    with without_update(model):
        before = quick_probabilities(model, tokenizer, sets, progress=progress)
    return before, quick_probabilities(model, tokenizer, sets, progress=progress)


def spread(records: Sequence[QA], limit: int | None) -> Sequence[QA]:
    """At most ``limit`` of the records, at even distances; None takes all."""
    count = min(len(records), limit or len(records))
    return [records[i * len(records) // count] for i in range(count)]


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Sequence[QA]],
    *,
    safe: SafeTargets | None = None,
    safe_seed: int = 0,
    retain_log: Log | None = None,
    reference_auc: float | None = None,
    mean: Mean = "geometric",
    max_length: int = 512,
    max_tokens: int = 4096,
    max_new_tokens: int = 200,
    generate: bool | Collection[str] = True,
    progress: bool = True,
    shares: Shares = Shares(),  # noqa: B008
) -> Evaluation:
    """Score a model on question-answer splits.

    Args:
        model: a Hugging Face causal language model, with or without adapters.
        tokenizer: of the model.
        splits: name -> records, names out of `SPLITS`. Only forget and holdout have a role beyond
            their own row; retain, real_authors and world_facts enter model utility.
        safe: the targets that forget questions were trained towards; adds their alignment.
        safe_seed: the seed of that training, so that each question gets the same target.
        retain_log: log of a model trained on retain data only, for forget quality.
        reference_auc: that model's membership_auc, for PrivLeak; 0.5 where there is none, which is
            noted.
        mean: how wrong answers average in the truth ratio.
        max_length: longest sequence accepted.
        max_tokens: most tokens of a scored batch, padding included; KV caches of generated answers
            hold at most four times as many.
        max_new_tokens: longest generated answer.
        generate: False leaves out greedy answers, and with them ROUGE and model utility; names out
            of splits give them for these alone.
        progress: show progress bars.
        shares: of the processes that evaluate together, each of which gets the whole evaluation,
            the same as of one process.

    Returns:
        Means of every metric by split, and each question's own values; `to_results` makes them
        JSON, and `format_table` of that prints them.

    Raises:
        ChildProcessError: another of them failed.
        ValueError: an unknown or empty split, a sequence that is too long, or a diverged model.
    """
    start = time.perf_counter()
    _check_splits(splits)
    asked: dict[str, list[tuple[QA, str | None]]] = {
        split: [
            (qa, safe.target(qa, safe_seed) if safe and split == "forget" else None)
            for qa in records
        ]
        for split, records in splits.items()
    }
    flat = [pair for pairs in asked.values() for pair in pairs]
    encoded = {
        sequence: encode_qa(tokenizer, *sequence, max_length=max_length)
        for sequence in dict.fromkeys(s for pair in flat for s in _sequences(*pair))
    }
    own = {(qa.question, qa.answer) for qa, _ in flat}
    wanted = set(splits if generate is True else generate or ())
    if isinstance(generate, str) or not wanted <= splits.keys():
        raise ValueError(
            f"evaluate: generate must be True, False or names of splits ({', '.join(splits)}), got "
            f"{generate!r}."
        )
    answered = [split for split in splits if split in wanted]

    def share() -> tuple[dict[int, Score], dict[str, str]]:
        found = score_share(
            shares,
            model,
            tokenizer,
            list(encoded.values()),
            predict=[sequence in own for sequence in encoded],
            max_tokens=max_tokens,
            progress=progress,
        )
        return found, answer_share(
            shares,
            model,
            tokenizer,
            [qa.question for split in answered for qa in splits[split]],
            max_new_tokens=max_new_tokens,
            max_tokens=_CACHED * max_tokens,
            progress=progress,
        )

    parts = shares.gather(share)
    found = {index: score for scored, _ in parts for index, score in scored.items()}
    scores = {sequence: found[index] for index, sequence in enumerate(encoded)}
    rows = {
        split: [_row(qa, target, encoded, scores, split, mean) for qa, target in pairs]
        for split, pairs in asked.items()
    }
    texts = {question: text for _, answers in parts for question, text in answers.items()}
    _add_answers({split: rows[split] for split in rows if split in answered}, texts)
    result = Evaluation(rows=rows)
    for split, split_rows in rows.items():
        result.metrics[split] = _means(split, split_rows, result.notes)
        if split in LOG_FILES and "truth_ratio" in result.metrics[split]:
            result.log[LOG_FILES[split]] = _log(split_rows)
            plain = sum(qa.paraphrased_answer is None for qa in splits[split])
            if 0 < plain < len(split_rows):
                result.notes.append(
                    f"{split}: truth_ratio of {plain} of {len(split_rows)} records is of their own "
                    "answer, for they have no paraphrased_answer"
                )
    _add_utility(result, mean, answered)
    _add_forget_quality(result, retain_log, mean)
    _add_privacy(result, splits, reference_auc)
    result.seconds = time.perf_counter() - start
    return result


def _sequences(qa: QA, target: str | None) -> Iterator[tuple[str, str]]:
    """Question and answer of each sequence that a record's row needs."""
    yield qa.question, qa.answer
    yield qa.question, qa.paraphrased_answer or qa.answer
    for wrong in qa.perturbed_answers:
        yield qa.question, wrong
    if qa.paraphrased_question is not None:
        yield qa.paraphrased_question, qa.answer
    if target is not None:
        yield qa.question, target


def _row(
    qa: QA,
    target: str | None,
    encoded: Mapping[tuple[str, str], Encoded],
    scores: Mapping[tuple[str, str], Score],
    split: str,
    mean: Mean,
) -> Row:
    right = scores[qa.question, qa.answer]
    tokens = encoded[qa.question, qa.answer].answer
    own = slice(len(tokens))
    row: Row = {
        "question": qa.question,
        "answer": qa.answer,
        "probability": right.probability,
        "loss": right.loss,
        "answer_tokens": len(tokens),
        "extraction_strength": extraction_strength(right.predictions[own], tokens),
        "exact_memorisation": exact_memorisation(right.predictions[own], tokens),
        "min_k": min_k(right.nll[own]),
    }
    if qa.perturbed_answers:
        row["paraphrased_loss"] = scores[qa.question, qa.paraphrased_answer or qa.answer].loss
        row["perturbed_loss"] = [scores[qa.question, wrong].loss for wrong in qa.perturbed_answers]
        ratio = truth_ratio([row["paraphrased_loss"]], [row["perturbed_loss"]], mean)
        row["truth_ratio"] = float(ratio[0])
        if split in OPTION_SPLITS:
            wrong = np.array(row["perturbed_loss"])
            row["option_probability"] = float(option_probability([right.loss], [wrong])[0])
    if qa.paraphrased_question is not None:
        row["reworded_probability"] = scores[qa.paraphrased_question, qa.answer].probability
    if target is not None:
        row["safe_target"] = target
        row["safe_probability"] = scores[qa.question, target].probability
    return row


def _add_answers(rows: Mapping[str, list[Row]], answers: Mapping[str, str]) -> None:
    for row in (row for split_rows in rows.values() for row in split_rows):
        row["generated"] = text = answers[row["question"]]
        for key, reference in (("rougeL_recall", "answer"), ("safe_rougeL_recall", "safe_target")):
            if reference in row and has_words(row[reference]):
                row[key] = rouge_l_recall(row[reference], text)


def add_base_answers(
    evaluation: Evaluation,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 200,
    examples: int = EXAMPLES_PER_SPLIT,
    progress: bool = True,
) -> None:
    """Answer the questions that `to_results` shows once more by the base model in ``model``."""
    rows = [row for found in evaluation.rows.values() for row in found[:examples]]
    with without_update(model):
        answers = greedy_answers(
            model,
            tokenizer,
            [row["question"] for row in rows],
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    for row, text in zip(rows, answers, strict=True):
        row["base_generated"] = text


def _means(split: str, rows: Sequence[Row], notes: list[str]) -> dict[str, float]:
    """Mean of each metric that every record of the split has; the others are noted.

    ROUGE is a mean over the records whose reference it can read."""
    metrics: dict[str, float] = {"count": len(rows)}
    for key in METRICS:
        values = [row[key] for row in rows if key in row]
        unread = len(rows) - len(values) if key in _OF_WORDS and "generated" in rows[0] else 0
        if unread and (key == "rougeL_recall" or "safe_target" in rows[0]):
            notes.append(
                f"{split}: {key} says nothing of {unread} of {len(rows)} records, whose "
                "reference has no word of a-z and 0-9"
            )
        if len(values) == len(rows) or (values and unread):
            if key == "truth_ratio":
                metrics[key] = truth_ratio_score(np.array(values), forget=split == "forget")
            else:
                metrics[key] = float(np.mean(values))
        elif values:
            notes.append(
                f"{split}: {key} left out, {len(rows) - len(values)} of {len(rows)} records lack "
                f"{_NEEDS[key]}"
            )
    return metrics


_OF_WORDS = ("rougeL_recall", "safe_rougeL_recall")
_NEEDS = {
    "truth_ratio": "perturbed_answers",
    "option_probability": "perturbed_answers",
    "reworded_probability": "paraphrased_question",
}


def _log(rows: Sequence[Row]) -> dict[str, list]:
    columns = {
        "avg_gt_loss": "loss",
        "avg_paraphrased_loss": "paraphrased_loss",
        "average_perturb_loss": "perturbed_loss",
        "rougeL_recall": "rougeL_recall",
    }
    # TOFU scores 0 where a reference has no word that ROUGE knows.
    return {
        name: [row.get(key, 0.0) for row in rows]
        for name, key in columns.items()
        if key in rows[0] or (key == "rougeL_recall" and "generated" in rows[0])
    }


def _add_utility(result: Evaluation, mean: Mean, answered: Collection[str]) -> None:
    present = [split for split in UTILITY_SPLITS if LOG_FILES[split] in result.log]
    if not set(present) <= set(answered) or not answered:
        result.notes.append("model_utility: needs ROUGE-L, and generate is off")
    elif not present:
        result.notes.append(
            f"model_utility: none of {', '.join(UTILITY_SPLITS)} was given with perturbed_answers"
        )
    elif unread := sum(
        "rougeL_recall" not in row for split in present for row in result.rows[split]
    ):
        result.notes.append(
            f"model_utility: left out, for ROUGE-L cannot read {unread} answers, which have no "
            "word of a-z and 0-9"
        )
    else:
        utility = model_utility(result.log, mean)
        result.overall["model_utility"] = float(utility)
        result.utility_splits = utility.splits


def _add_forget_quality(result: Evaluation, retain_log: Log | None, mean: Mean) -> None:
    if "forget" not in result.rows:
        return
    if LOG_FILES["forget"] not in result.log:
        rows = result.rows["forget"]
        lacking = sum("perturbed_loss" not in row for row in rows)
        result.notes.append(
            f"forget_quality: {lacking} of {len(rows)} forget records have no perturbed_answers"
        )
    elif retain_log is None:
        result.notes.append(
            "forget_quality: needs the log of a model trained on the retain data only"
        )
    else:
        quality = forget_quality(result.log, retain_log, mean)
        result.overall["forget_quality"] = float(quality)
        result.overall["forget_quality_ks"] = quality.statistic


def _add_privacy(
    result: Evaluation, splits: Mapping[str, Sequence[QA]], reference_auc: float | None
) -> None:
    if "forget" not in splits:
        return
    if "holdout" not in splits:
        result.notes.append("privleak: needs a holdout split, questions never trained on")
        return
    if shared := shared_questions(splits["holdout"], splits["forget"]):
        result.notes.append(
            f"privleak, membership_auc: left out, {len(shared)} of {len(splits['holdout'])} "
            "holdout questions are forget questions too"
        )
        return
    forget, holdout = (
        [row["min_k"] for row in result.rows[split]] for split in ("forget", "holdout")
    )
    auc = membership_auc(forget, holdout)
    result.overall["membership_auc"] = auc
    if reference_auc is None:
        result.notes.append(
            "privleak: against an AUC of 0.5, which a model that never saw the forget set need not "
            "have; give the log of a model trained on the retain data only"
        )
    if reference_auc == 1:
        result.notes.append(
            "privleak: left out, by the log's membership_auc of 1 its model was trained on the "
            "forget set, or the holdout questions differ in kind"
        )
        return
    result.overall["privleak"] = privleak(auc, 0.5 if reference_auc is None else reference_auc)


def _check_splits(splits: Mapping[str, Sequence[QA]]) -> None:
    if not splits:
        raise ValueError(f"evaluate: splits is empty; give at least one of {', '.join(SPLITS)}.")
    for name, records in splits.items():
        if name not in SPLITS:
            raise ValueError(f"evaluate: splits must be out of {', '.join(SPLITS)}, got {name!r}.")
        if not records:
            raise ValueError(f"evaluate: split {name!r} is empty; give at least one record.")
