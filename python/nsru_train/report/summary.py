"""The numbers a report is made of, read from results.json and metrics.jsonl.

results.json, as far as the report reads it; each key may be missing:

    kind, seconds, command  what ran
    setup       "questions": {set: how many of its questions the probabilities below are means of},
                "sizes": {set: how many it has}
    methods     a row for the model "before" and for each method and seed: method, seed, numbers.
                forget_prob, safe_prob, retain_prob, <set>_prob: mean probabilities of the answers
    frontier    the same probabilities at every evaluated step: method, seed, step
    metrics     {split: {metric: number}, metric over all splits: number}, and "notes"
    examples    split, question, original, safe_target, and an answer for each model
    attacks     name, and what the attacked model knew of the forget set: numbers
    subspaces   diagnostics of each retain subspace
    leakage     module, leakage, rounding; method where it is not the first one
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from nsru_kernels.subspaces.collection import ALL
from nsru_train.methods import method_of_run

Row = Mapping[str, Any]

FORGET_TARGET = 0.1
SAFE_TARGET = 0.7
RETAIN_TARGET = 0.9
LEAKAGE_TOLERANCE = 1e-6
# Below one percent a forgotten answer is gone for any use; comparing there would compare noise.
MATCH_FLOOR = 0.01
# More methods than this are a row each instead of a line.
FEW_METHODS = 5
PROBABILITIES = {
    "forget_prob": "Forgotten answers",
    "forget_rest_prob": "Forgotten answers not relearnt",
    "safe_prob": "Safe answers",
    "retain_prob": "Retain answers trained on",
    "retain_unseen_prob": "Unseen retain answers",
    "retain_untouched_prob": "Untouched retain answers",
}
# Retain answers that damage is read on, which the retain loss never saw -> their figure.
DAMAGE_FIGURES = {"retain_unseen_prob": "frontier", "retain_untouched_prob": "frontier-untouched"}
LABELS = {
    "before": "Base model",
    "nsru": "NSRU",
    "lora": "LoRA without projection",
    "train": "Training",
    "after": "Evaluated model",
}


def label(method: str, short: bool = False) -> str:
    """Name of a method as figures and tables show it."""
    name = LABELS.get(method, method)
    return name.split(" without ")[0] if short else name


def kind(module: Any) -> str:
    """Last part of a module's name, such as q_proj."""
    return str(module).rsplit(".", 1)[-1]


def number(value: Any) -> float | None:
    """``value`` as a float, None when it is no finite number (JSON's null stands for NaN)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= sys.float_info.max else None


def values(rows: Iterable[Row], key: str) -> list[float]:
    """The numbers under ``key``, rows without one left out."""
    return [v for row in rows if (v := number(row.get(key))) is not None]


def of_method(rows: Iterable[Row], method: str) -> list[Row]:
    """Rows of one method, by seed then step."""
    return sorted(
        (row for row in rows if str(row.get("method", "train")) == method),
        key=lambda row: (
            isinstance(seed := row.get("seed") or 0, str),
            seed,
            row.get("step") or 0,
        ),
    )


def method_names(rows: Iterable[Row]) -> list[str]:
    """Methods in the order in which they appear, the base model ("before") left out."""
    found = dict.fromkeys(str(row.get("method", "train")) for row in rows)
    return [name for name in found if name != "before"]


def runs(rows: Sequence[Row], *keys: str) -> dict[str, dict[Any, list[Row]]]:
    """Method -> seed -> rows by step; rows that lack a step or one of ``keys`` are left out."""
    found: dict[str, dict[Any, list[Row]]] = {}
    for method in method_names(rows):
        for row in of_method(rows, method):
            if all(number(row.get(key)) is not None for key in ("step", *keys)):
                found.setdefault(method, {}).setdefault(row.get("seed", 0), []).append(row)
    return found


def before_value(results: Row, key: str, seed: Any = None) -> float | None:
    """Value before unlearning: of that seed where it was measured, else the mean over seeds."""
    rows = of_method(results.get("methods") or [], "before")
    own = [row for row in rows if seed is not None and row.get("seed") == seed]
    found = values(own or rows, key)
    return fmean(found) if found else None


def ends(results: Row, *keys: str) -> dict[str, list[tuple[float, ...]]]:
    """Method -> the values of ``keys`` at the end of each of its runs that has them all."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for row in results.get("methods") or []:
        values = [number(row.get(key)) for key in keys]
        known = tuple(value for value in values if value is not None)
        if len(known) == len(keys) and row.get("method") != "before":
            found.setdefault(str(row.get("method", "train")), []).append(known)
    return found


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
    """Compare the methods' damage to retain answers at equal forgetting, seed by seed.

    All seeds are read at one level of forgetting: the lowest forget_prob that every run reached,
    or 0.01 where all went below. Of many methods those that do not forget (forget_prob 0.1 with
    every seed) are left out, and so is what trains nothing, at a rate of 0. A run's damage there is
    the least among its evaluated steps with forget_prob at or below the level: every method is read
    at the checkpoint a user would keep.

    Args:
        results: content of results.json with "methods" (for the values before) and "frontier".
        key: the retain answers to look at: retain_unseen_prob, of questions that the retain loss
            never saw, or retain_untouched_prob, of questions that the subspaces never saw either.

    Returns:
        One row for each seed that all methods share: ``seed``, ``forget_prob`` (the level),
        ``METHOD_damage`` and ``METHOD_step`` for each method, and ``ratio`` = damage of the first
        method / least damage of its `rivals`, None when that did none. Empty when there is nothing
        to compare.
    """
    points = [row for row in results.get("frontier") or [] if row.get("lr") != 0]
    found = runs(points, "forget_prob", key)
    able = {method: seeds for method, seeds in found.items() if all(map(_forgets, seeds.values()))}
    found = able if len(found) > FEW_METHODS and len(able) > 1 else found
    first, *others = list(found) or [""]
    seeds = [s for s in found.get(first, ()) if all(s in found[method] for method in others)]
    if not others or not seeds or before_value(results, key) is None:
        return []
    lowest = (min(r["forget_prob"] for r in found[method][s]) for method in found for s in seeds)
    level = max(MATCH_FLOOR, *lowest)
    table = []
    for seed in seeds:
        before = before_value(results, key, seed)
        row: dict[str, Any] = {"seed": seed, "forget_prob": level}
        for method in found:
            reached = [r for r in found[method][seed] if r["forget_prob"] <= level]
            best = max(reached, key=lambda r: r[key])
            row[f"{method}_damage"] = before - best[key]
            row[f"{method}_step"] = best["step"]
        least = min(row[f"{method}_damage"] for method in rivals(others))
        row["ratio"] = row[f"{first}_damage"] / least if least > 0 else None
        table.append(row)
    return table


def untrained_damage(
    results: Row, matched: Sequence[Row], key: str = "retain_unseen_prob"
) -> dict[str, float | None]:
    """Methods that train nothing, at a rate of 0 → their mean damage.

    None where one forgot less, with a seed, than those that `matched_damage` compares.
    """
    untrained = method_names(row for row in results.get("frontier") or [] if row.get("lr") == 0)
    before, found = before_value(results, key), ends(results, "forget_prob", key)
    damage: dict[str, float | None] = dict.fromkeys(untrained)
    if before is None or not matched:
        return damage
    for method in untrained:
        ended = found.get(method, [])
        if ended and all(forgotten <= matched[0]["forget_prob"] for forgotten, _ in ended):
            damage[method] = before - fmean(kept for _, kept in ended)
    return damage


def best_few(results: Row) -> list[str]:
    """The first method, and those that cost unseen answers least at equal forgetting."""
    matched = matched_damage(results)
    names = [key.removesuffix("_damage") for key in (*matched, {})[0] if key.endswith("_damage")]
    best = sorted(names[1:], key=lambda name: fmean(values(matched, f"{name}_damage")))
    return [*names[:1], *best[: FEW_METHODS - 1]]


def rivals(others: Sequence[str]) -> list[str]:
    """Those that a method in the null space is compared with: the unprojected ones, if any."""
    return [method for method in others if not method.endswith(" projected")] or list(others)


def _forgets(rows: Sequence[Row]) -> bool:
    return any(row["forget_prob"] <= FORGET_TARGET for row in rows)


def projection_pairs(methods: Sequence[str]) -> dict[str, tuple[str | None, str | None]]:
    """Name of a method -> its runs without and with projection, as far as there are both."""
    pairs: dict[str, list[str | None]] = {}
    for method in methods:
        name, projected = method_of_run(method)
        pairs.setdefault(name, [None, None])[projected] = method
    return {name: (plain, projected) for name, (plain, projected) in pairs.items()}


def warnings(results: Row) -> list[str]:
    """Warnings before trusting the run: collapse, leakage, ranks cut short."""
    found = []
    attacked = results.get("kind") == "attack"  # there it is the attacker's loss
    for row in () if attacked else results.get("methods") or []:
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
    plain = {
        r.get("method") for r in results.get("methods") or [] if r.get("mean_retain_rank") == 0
    }
    leaking = [
        row
        for row in results.get("leakage") or []
        if row.get("method") not in plain
        and (
            number(row.get("leakage")) is None
            or row["leakage"] > max(LEAKAGE_TOLERANCE, row.get("rounding") or 0.0)
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
        str(row.get("name"))
        for row in results.get("subspaces") or []
        if row.get("rank_limited") and (number(row.get("captured_energy")) or 0) < ALL
    ]
    if limited:
        shown = ", ".join(limited[:4]) + (" …" if len(limited) > 4 else "")
        found.append(
            f"Fewer directions were found than asked for in {len(limited)} of "
            f"{len(results['subspaces'])} retain subspaces ({shown}): the sketch holds no more. "
            "Raise subspace.width, at most to in_features."
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

# Title -> (method, seed) -> [(step, value)].
Curves = dict[str, dict[tuple[str, Any], list[tuple[float, float]]]]


def loss_series(metrics: Sequence[Row]) -> Curves:
    """Losses over the steps, from metrics.jsonl."""
    return curves(metrics, LOSS_TITLES)


def curves(rows: Sequence[Row], titles: Mapping[str, str]) -> Curves:
    """Curves under one title, over the steps.

    After a resume the same step can occur twice; the later line counts.
    """
    series: dict[str, dict[tuple[str, Any], dict[float, float]]] = {}
    for row in rows:
        step = number(row.get("step"))
        run = (str(row.get("method", "train")), row.get("seed", 0))
        for key, value in row.items():
            title = titles.get(key.removeprefix("loss_").removesuffix("_loss"))
            if step is not None and title and number(value) is not None:
                series.setdefault(title, {}).setdefault(run, {})[step] = float(value)
    return {
        title: {run: sorted(points.items()) for run, points in series[title].items()}
        for title in dict.fromkeys(titles.values())
        if title in series
    }


def mean_curve(seeds: Iterable[Iterable[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Mean over the seeds at the steps that all of them have."""
    found = [dict(points) for points in seeds]
    shared = sorted(set.intersection(*map(set, found)))
    return [(step, fmean(points[step] for points in found)) for step in shared]
