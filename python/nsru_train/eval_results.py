"""An evaluation's content, as results.json and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nsru_kernels.text_table import align_columns
from nsru_train.metrics.tofu import UTILITY_SPLITS

SCHEMA = 1
EXAMPLES_PER_SPLIT = 8

# Metric of a split -> its heading.
METRICS = {
    "count": "n",
    "probability": "p(answer)",
    "option_probability": "p(option)",
    "reworded_probability": "p(reworded q)",
    "rougeL_recall": "ROUGE-L",
    "truth_ratio": "truth ratio",
    "extraction_strength": "extraction",
    "exact_memorisation": "exact mem.",
    "min_k": "min-k log p",
    "safe_probability": "p(safe)",
    "safe_rougeL_recall": "safe ROUGE-L",
}

# Column of a task's metrics -> its heading.
TASKS = {"before": "base model", "after": "evaluated"}

Row = dict[str, Any]


@dataclass
class Evaluation:
    """Everything that `evaluate` found.

    Attributes:
        log: TOFU's log (see `nsru_train.metrics.tofu`) of the splits that TOFU knows.
        metrics: split -> metric -> mean over its questions. truth_ratio is TOFU's score: mean
            max(0, 1 - R), on the forget split mean min(R, 1/R).
        overall: model_utility, forget_quality (p-value), forget_quality_ks (D), membership_auc,
            privleak (percent); those that could be computed.
        utility_splits: the splits that entered model_utility.
        notes: what was not computed, and why.
        rows: split -> one record a question, with its own values and texts.
        tasks: metrics of lm-eval's tasks, as `nsru_train.harness.Tasks.evaluate` gives them.
        seconds: wall time.
    """

    log: dict[str, dict[str, list]] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    overall: dict[str, float] = field(default_factory=dict)
    utility_splits: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    tasks: list[Row] = field(default_factory=list)
    seconds: float = 0.0


def to_results(evaluation: Evaluation, examples: int = EXAMPLES_PER_SPLIT) -> dict[str, Any]:
    """The content of results.json: schema 1, kind "eval". `load_log` reads its log back.

    In "examples", "before" is the base model's answer and "after" that of the evaluated model; so
    are those numbers in "tasks", the metrics of lm-eval's tasks where there are some.

    Args:
        evaluation: from `evaluate`.
        examples: questions of a split, from its start, that are in "examples".

    Returns:
        What can be written as JSON.
    """
    return {
        "schema": SCHEMA,
        "kind": "eval",
        "seconds": evaluation.seconds,
        "metrics": {**evaluation.metrics, **evaluation.overall},
        "model_utility_splits": list(evaluation.utility_splits),
        "notes": evaluation.notes,
        "examples": [
            {
                "split": split,
                "question": row["question"],
                "original": row["answer"],
                "safe_target": row.get("safe_target"),
                "before": row.get("base_generated"),
                "after": row.get("generated"),
            }
            for split, rows in evaluation.rows.items()
            for row in rows[:examples]
        ],
        "log": evaluation.log,
        **({"tasks": evaluation.tasks} if evaluation.tasks else {}),
    }


def format_table(results: Mapping[str, Any]) -> str:
    """Results of kind "eval" as text: one line a split, then the overall numbers and notes.

    Args:
        results: from `to_results`.

    Returns:
        The table, without a line break at its end.

    Raises:
        ValueError: another kind or schema.
    """
    if results.get("kind") != "eval" or results.get("schema") != SCHEMA:
        raise ValueError(
            f"format_table: results must be of kind 'eval', schema {SCHEMA}; got kind "
            f"{results.get('kind')!r}, schema {results.get('schema')!r}."
        )
    splits = {k: v for k, v in results["metrics"].items() if isinstance(v, Mapping)}
    columns = [key for key in METRICS if any(key in row for row in splits.values())]
    cells = [["split", *(METRICS[key] for key in columns)]]
    cells += [
        [split, *(_cell(key, row.get(key)) for key in columns)] for split, row in splits.items()
    ]
    head, *lines = align_columns(cells)
    lines = [head, "-" * len(head), *lines, ""]
    overall = {k: v for k, v in results["metrics"].items() if not isinstance(v, Mapping)}
    for key, value in overall.items():
        text = f"{key:<18} {value:.4g}"
        if key == "model_utility":
            missing = [s for s in UTILITY_SPLITS if s not in results["model_utility_splits"]]
            text += f"  from {', '.join(results['model_utility_splits'])}"
            text += f" (without {', '.join(missing)}: not TOFU's number)" if missing else ""
        lines.append(text)
    if asked := [row for row in results.get("tasks", ()) if "group" not in row]:
        head, *rows = align_columns(task_cells(asked))
        lines += ["", head, "-" * len(head), *rows, ""]
    lines += [f"note: {note}" for note in results["notes"]]
    return "\n".join(lines)


def format_probabilities(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Mean answer probabilities as text: one line a model, one column a set.

    Args:
        rows: what to call a model -> its SET_prob, 0 to 1, as `before_and_after` gives them; other
            entries are left out.

    Returns:
        The table, without a line break at its end.
    """
    names = [name for name in next(iter(rows.values())) if name.endswith("_prob")]
    cells = [["probability of answers", *(name.removesuffix("_prob") for name in names)]]
    cells += [[model, *(f"{row[name]:.4f}" for name in names)] for model, row in rows.items()]
    return "\n".join(align_columns(cells))


def probability_line(step: int, found: Mapping[str, float]) -> str:
    """Mean answer probabilities at one step of training, on a line.

    Args:
        step: optimizer steps done.
        found: SET_prob, 0 to 1, as `quick_probabilities` gives them.

    Returns:
        Such as "step 10: probability of answers: forget 0.1234, retain 0.9876".
    """
    shown = (f"{name.removesuffix('_prob')} {value:.4f}" for name, value in found.items())
    return f"step {step}: probability of answers: {', '.join(shown)}"


def task_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Heads and cells of a table of "tasks", each number with its standard error."""
    columns = [key for key in TASKS if any(key in row for row in rows)]
    cells = [["task", "metric", *(TASKS[key] for key in columns), "questions"]]
    for row in rows:
        shown = [_with_error(row.get(key), row.get(f"{key}_stderr")) for key in columns]
        cells.append([str(row["task"]), str(row["metric"]), *shown, str(row["questions"])])
    return cells


def _with_error(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:d}" if key == "count" else f"{value:.4f}"
