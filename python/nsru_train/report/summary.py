"""The numbers a report is made of, read from results.json and metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

Row = Mapping[str, Any]

FORGET_TARGET = 0.1
SAFE_TARGET = 0.7
RETAIN_TARGET = 0.9
LEAKAGE_TOLERANCE = 1e-6
# Below one percent a forgotten answer is gone for any use; comparing there would compare noise.
MATCH_FLOOR = 0.01
# Retain answers that damage is read on -> what pictures and page call them.
RETAIN_NAMES = {
    "retain_unseen_prob": "unseen retain answers",
    "retain_untouched_prob": "untouched retain answers",
}


def number(value: Any) -> float | None:
    """``value`` as a float, None when it is not a number (JSON's null stands for NaN)."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def values(rows: Iterable[Row], key: str) -> list[float]:
    """The numbers under ``key``, rows without one left out."""
    return [v for row in rows if (v := number(row.get(key))) is not None]


def mean(rows: Iterable[Row], key: str) -> float | None:
    """Mean over the rows that have ``key``."""
    found = values(rows, key)
    return fmean(found) if found else None


def of_method(rows: Iterable[Row], method: str) -> list[Row]:
    """Rows of one method, by seed then step."""
    return sorted(
        (row for row in rows if row.get("method") == method),
        key=lambda row: (row.get("seed") or 0, row.get("step") or 0),
    )


def method_names(rows: Iterable[Row]) -> list[str]:
    """Methods that appear, NSRU and LoRA first, 'before' left out."""
    found = dict.fromkeys(str(row.get("method", "train")) for row in rows)
    known = [name for name in ("nsru", "lora") if name in found]
    return known + [name for name in found if name not in ("before", *known)]


@dataclass(frozen=True)
class Trajectory:
    """One method over the steps: every seed, and their mean at the steps that all share."""

    method: str
    seeds: dict[Any, list[Row]]
    mean: list[dict[str, float]]


def trajectories(frontier: Sequence[Row], keys: Sequence[str]) -> list[Trajectory]:
    """Group frontier points by method and seed; points that lack one of ``keys`` are left out."""
    result = []
    for method in method_names(frontier):
        seeds: dict[Any, list[Row]] = {}
        for row in of_method(frontier, method):
            if all(number(row.get(key)) is not None for key in ("step", *keys)):
                seeds.setdefault(row.get("seed", 0), []).append(row)
        if not seeds:
            continue
        by_step = [{row["step"]: row for row in rows} for rows in seeds.values()]
        shared = sorted(set.intersection(*(set(rows) for rows in by_step)))
        averaged = [
            {"step": step, **{key: fmean(rows[step][key] for rows in by_step) for key in keys}}
            for step in shared
        ]
        result.append(Trajectory(method, seeds, averaged))
    return result


def before_value(results: Row, key: str, seed: Any = None) -> float | None:
    """Value before unlearning: of that seed where it was measured, else the mean over seeds."""
    rows = of_method(results.get("methods") or [], "before")
    own = [row for row in rows if seed is not None and row.get("seed") == seed]
    return mean(own or rows, key)


def damage_curve(
    points: Sequence[Row], before: float, key: str = "retain_unseen_prob"
) -> list[tuple[float, float]]:
    """Pareto curve of one run: (forget_prob reached, least damage among points that reached it).

    Damage is the probability lost on the retain answers that ``key`` names.
    """
    curve: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda row: row["forget_prob"]):
        damage = before - point[key]
        if not curve or damage < curve[-1][1]:
            curve.append((point["forget_prob"], damage))
    return curve


def matched_damage(results: Row, key: str = "retain_unseen_prob") -> list[dict[str, Any]]:
    """Compare NSRU's and LoRA's damage to retain answers at equal forgetting, seed by seed.

    All seeds are read at one level of forgetting: the lowest forget_prob that every run reached,
    or 0.01 where all went below. A run's damage there is the least among its evaluated steps with
    forget_prob at or below the level: both methods are read at the checkpoint a user would keep.

    Args:
        results: content of results.json with "methods" (for the values before) and "frontier".
        key: the retain answers to look at: retain_unseen_prob, of questions that the retain loss
            never saw, or retain_untouched_prob, of questions that the subspaces never saw either.

    Returns:
        One row a seed that has both methods: ``seed``, ``forget_prob`` (the level),
        ``nsru_damage``, ``lora_damage``, ``nsru_step``, ``lora_step`` and ``ratio`` = NSRU / LoRA,
        None when LoRA did no damage. Empty when there is nothing to compare.
    """
    keys = ("forget_prob", key)
    runs = {t.method: t.seeds for t in trajectories(results.get("frontier") or [], keys)}
    if "nsru" not in runs or "lora" not in runs:
        return []
    seeds = [seed for seed in runs["nsru"] if seed in runs["lora"]]
    if not seeds or before_value(results, key) is None:
        return []
    lowest = (
        min(row["forget_prob"] for row in runs[method][seed])
        for method in ("nsru", "lora")
        for seed in seeds
    )
    level = max(MATCH_FLOOR, *lowest)
    table = []
    for seed in seeds:
        before = before_value(results, key, seed)
        row: dict[str, Any] = {"seed": seed, "forget_prob": level}
        for method in ("nsru", "lora"):
            reached = [r for r in runs[method][seed] if r["forget_prob"] <= level]
            best = max(reached, key=lambda r: r[key])
            row[f"{method}_damage"] = before - best[key]
            row[f"{method}_step"] = best["step"]
        row["ratio"] = row["nsru_damage"] / row["lora_damage"] if row["lora_damage"] > 0 else None
        table.append(row)
    return table


def matched_rows(results: Row, key: str = "retain_unseen_prob") -> list[dict[str, Any]]:
    """The run's own "matched" comparison, computed from the frontier when it was not stored."""
    if key != "retain_unseen_prob":
        return matched_damage(results, key)
    stored = [
        row
        for row in results.get("matched") or []
        if values([row], "nsru_damage") and values([row], "lora_damage")
    ]
    return stored or matched_damage(results, key)


def warnings(results: Row) -> list[str]:
    """What a reader must know before trusting the run: collapse, leakage, ranks cut short."""
    found = []
    for row in results.get("methods") or []:
        method, seed = row.get("method"), row.get("seed", 0)
        retained, before = (
            number(row.get("retain_prob")),
            before_value(results, "retain_prob", seed),
        )
        if method != "before" and retained is not None and before and retained < 0.5 * before:
            found.append(
                f"{method}, seed {seed}: collapsed. Retain answers fell from {before:.3f} to "
                f"{retained:.3f}; lower the learning rate or the suppression weight."
            )
        if row.get("stopped_early"):
            found.append(f"{method}, seed {seed}: stopped early ({row['stopped_early']}).")
    leaking = [
        row
        for row in results.get("leakage") or []
        if row.get("method", "nsru") == "nsru"
        and (
            number(row.get("leakage")) is None
            or row["leakage"] > max(LEAKAGE_TOLERANCE, row.get("rounding", 0.0))
        )
    ]
    if leaking:
        worst = max(leaking, key=lambda row: number(row.get("leakage")) or float("inf"))
        found.append(
            f"Leakage into the retain subspace exceeds {LEAKAGE_TOLERANCE:g} in {len(leaking)} of "
            f"{len(results['leakage'])} adapters "
            f"(worst: {worst.get('module')}, {worst.get('leakage')})."
        )
    limited = [
        str(row.get("name")) for row in results.get("subspaces") or [] if row.get("rank_limited")
    ]
    if limited:
        shown = ", ".join(limited[:4]) + (" …" if len(limited) > 4 else "")
        found.append(
            f"Sketch width ran out before the requested energy was reached in {len(limited)} of "
            f"{len(results['subspaces'])} retain subspaces ({shown}); raise the width."
        )
    return found


# Name in metrics.jsonl, "loss_" before or "_loss" behind left out -> title, in the order shown.
LOSS_TITLES = {
    "loss": "Total",
    "total": "Total",
    "safe": "Safe answer",
    "suppress": "Suppression",
    "retain": "Retain",
    "kl": "KL to base",
}


def loss_series(
    metrics: Sequence[Row],
) -> dict[str, dict[tuple[str, Any], list[tuple[float, float]]]]:
    """Losses over steps: title of the loss -> (method, seed) -> [(step, value)].

    After a resume the same step can occur twice; the later line counts.
    """
    series: dict[str, dict[tuple[str, Any], dict[float, float]]] = {}
    for row in metrics:
        step = number(row.get("step"))
        run = (str(row.get("method", "train")), row.get("seed", 0))
        for key, value in row.items():
            title = LOSS_TITLES.get(key.removeprefix("loss_").removesuffix("_loss"))
            if step is not None and title and number(value) is not None:
                series.setdefault(title, {}).setdefault(run, {})[step] = float(value)
    return {
        title: {run: sorted(points.items()) for run, points in series[title].items()}
        for title in dict.fromkeys(LOSS_TITLES.values())
        if title in series
    }
