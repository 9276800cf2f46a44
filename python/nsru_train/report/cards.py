"""Headline cards: what was forgotten, what was kept, and how NSRU did against LoRA."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from statistics import fmean

from . import summary
from .summary import Row
from .theme import method_colour, method_label


def headline_cards(results: Row) -> str:
    """The cards of every headline that the results can support; an empty string for none."""
    goals: list[tuple[str, str, str, Callable[[float, float | None], bool]]] = [
        (
            "forget_prob",
            "Forgotten answers",
            f"at most {summary.FORGET_TARGET:g}",
            lambda after, _: after <= summary.FORGET_TARGET,
        ),
        (
            "safe_prob",
            "Safe answers",
            f"at least {summary.SAFE_TARGET:g}",
            lambda after, _: after >= summary.SAFE_TARGET,
        ),
        (
            "retain_prob",
            "Retained answers",
            f"at least {summary.RETAIN_TARGET:.0%} of before",
            lambda after, before: before is not None and after >= summary.RETAIN_TARGET * before,
        ),
        ("retain_unseen_prob", "Unseen retain", "", lambda *_: True),
        ("retain_untouched_prob", "Untouched retain", "", lambda *_: True),
    ]
    groups = {
        "compare": [_comparison(results, key) for key in summary.RETAIN_NAMES],
        "cards": [_change(results, *goal) for goal in goals],
    }
    return "".join(
        f"<div class={name}>{''.join(cards)}</div>" for name, cards in groups.items() if any(cards)
    )


def _change(
    results: Row, key: str, title: str, target: str, met: Callable[[float, float | None], bool]
) -> str:
    """Probability before and after for each method; the verdict is on the first one (NSRU)."""
    rows = results.get("methods") or []
    lines, verdict = [], ""
    before = summary.before_value(results, key)
    for method in summary.method_names(rows):
        runs = [row for row in summary.of_method(rows, method) if summary.values([row], key)]
        if not runs:
            continue
        after = summary.values(runs, key)
        lines.append(_line(method, before, after))
        if target and not verdict:
            count = sum(
                met(value, summary.before_value(results, key, row.get("seed")))
                for row, value in zip(runs, after, strict=True)
            )
            met_in = "met" if count else "not met"
            if len(after) > 1:
                met_in = f"met in {count} of {len(after)} seeds"
            verdict = _verdict(count == len(after), f"Goal {escape(target)}: {met_in}")
    return _card(title, "mean probability", lines, verdict) if lines else ""


def _line(method: str, before: float | None, after: list[float]) -> str:
    arrow = f"<span class=from>{_probability(before)} →</span> " if before is not None else ""
    spread = ""
    label = "LoRA" if method == "lora" else method_label(method)
    if len(after) > 1:
        spread = f"<small>seeds {_probability(min(after))} to {_probability(max(after))}</small>"
    return (
        f"<p class=value style='--key:var(--{method_colour(method)})'>"
        f"<span class=key>{escape(label)}</span>"
        f"<span>{arrow}<b>{_probability(fmean(after))}</b></span>{spread}</p>"
    )


def _comparison(results: Row, key: str) -> str:
    matched = summary.matched_rows(results, key)
    if not matched:
        return ""
    nsru, lora = (fmean(row[f"{method}_damage"] for row in matched) for method in ("nsru", "lora"))
    wins = sum(row["nsru_damage"] < row["lora_damage"] for row in matched)
    if lora <= 0:
        big, words = "–", "no ratio: LoRA did no measurable damage"
    elif nsru <= 0:
        big, words = "0×", "NSRU did no measurable damage"
    else:
        big, words = f"{nsru / lora:.2f}×", "the damage of LoRA, mean over seeds"
    level = matched[0].get("forget_prob")
    at = (
        f", with the forgotten answer at {_probability(level)} or below"
        if summary.number(level)
        else ""
    )
    seeds = "".join(
        f"<tr><td>seed {escape(str(row.get('seed')))}</td><td>{row['nsru_damage']:.4f}</td>"
        f"<td>{row['lora_damage']:.4f}</td><td>{_ratio(row)}</td></tr>"
        for row in matched
    )
    lines = [
        f"<div class=split><div><p class=ratio><b>{big}</b> {words}</p>"
        f"<p class=note>Damage is lost probability{at}.</p></div>",
        "<table class=seeds><thead><tr><th></th><th>NSRU</th><th>LoRA</th><th>ratio</th></tr>"
        f"</thead><tbody>{seeds}</tbody></table></div>",
    ]
    verdict = _verdict(
        wins == len(matched), f"NSRU does less damage in {wins} of {len(matched)} seeds"
    )
    title = f"Damage to {summary.RETAIN_NAMES[key]}"
    return _card(
        title, "NSRU against LoRA without projection, at matched forgetting", lines, verdict
    )


def _ratio(row: Row) -> str:
    return f"{row['nsru_damage'] / row['lora_damage']:.2f}×" if row["lora_damage"] > 0 else "–"


def _card(title: str, unit: str, lines: list[str], verdict: str) -> str:
    head = f"<h3>{escape(title)} <small>{unit}</small></h3>"
    return f"<article class=card>{head}{''.join(lines)}{verdict}</article>"


def _verdict(met: bool, text: str) -> str:
    name, sign = ("met", "✓") if met else ("not-met", "✗")
    return f"<p class='verdict {name}'>{sign} {text}</p>"


def _probability(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value >= 1e-3 or value <= 0 else "&lt;0.001"
