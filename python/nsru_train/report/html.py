"""The report page: one HTML file with its pictures inside, for light and dark, offline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nsru_kernels.files import atomic_write
from nsru_train.eval_results import METRICS
from nsru_train.run_folder import RunFolder

from . import figures, subspace_figures, summary
from .canvas import Picture, draw
from .cards import headline_cards
from .style import STYLE
from .summary import Row, number
from .theme import css_variables, method_label

# Column of the methods table: key in results.json -> heading, format.
METHOD_COLUMNS = {
    "forget_prob": ("forgotten answer", "{:.3g}"),
    "safe_prob": ("safe answer", "{:.3f}"),
    "retain_prob": ("retain, trained on", "{:.4f}"),
    "retain_unseen_prob": ("retain, unseen", "{:.4f}"),
    "retain_untouched_prob": ("retain, untouched", "{:.4f}"),
    "model_utility": ("model utility", "{:.4f}"),
    "step_seconds": ("seconds a step", "{:.3f}"),
    "peak_bytes": ("peak memory, MiB", "{:.0f}"),
}


def write_report(run: str | Path | RunFolder) -> Path:
    """Write report.html and figures/*.png of a run from its results.json and metrics.jsonl.

    Parts that the run did not record are named at the end of the page.

    Args:
        run: the run folder.

    Returns:
        Path of report.html.

    Raises:
        FileNotFoundError: no results.json.
        ValueError: results.json is damaged or of another schema.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    page = render(folder.read_results(), folder.read_metrics(), folder)
    return atomic_write(folder.report_path, page)


def render(results: Row, metrics: Sequence[Row], folder: RunFolder) -> str:
    """The page as a string; draws the pictures into ``folder.figures_dir``."""
    sections, missing = _sections(results, metrics, folder.figures_dir)
    title = f"NSRU {results.get('kind', 'run')} report"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{css_variables()}{STYLE}</style></head><body><main>",
            _header(title, results, folder),
            headline_cards(results),
            _warnings(results),
            *sections,
            _missing(missing),
            _details("Configuration (config.yaml)", folder.config_path),
            _details("Environment (environment.json)", folder.environment_path),
            "</main></body></html>\n",
        ]
    )


def _sections(results: Row, metrics: Sequence[Row], folder: Path) -> tuple[list[str], list[str]]:
    """The page's sections, and the names of those that the run has no data for."""
    sections: list[str] = []
    missing: list[str] = []

    def picture(has_data: Any, name: str, title: str, caption: str, plot: Any, data: Any) -> None:
        if has_data:
            sections.append(_figure(draw(name, title, caption, plot, data, folder=folder)))
        else:
            missing.append(title)

    def table(content: str, title: str, caption: str) -> None:
        if content:
            sections.append(
                f"<section><h2>{escape(title)}</h2><p>{escape(caption)}</p>{content}</section>"
            )
        else:
            missing.append(title)

    frontier = results.get("frontier") or []
    subspaces = results.get("subspaces") or []
    leakage = results.get("leakage") or []
    picture(
        summary.trajectories(frontier, ("forget_prob", "retain_unseen_prob")),
        "frontier",
        "Forgetting against retention",
        "Each line is a run that starts at “before” and moves left as it forgets; a better method "
        "stays higher. Unseen retain answers belong to questions that the retain loss never saw. "
        "Right: the least damage among evaluated steps that forgot at least that much; the dots "
        "are compared in the headline.",
        figures.frontier,
        results,
    )
    if summary.trajectories(frontier, ("forget_prob", "retain_untouched_prob")):
        picture(
            True,
            "frontier-untouched",
            "The same on untouched retain answers",
            "These questions were in neither the retain loss nor the activations that the retain "
            "subspaces were estimated on.",
            lambda found: figures.frontier(found, "retain_untouched_prob"),
            results,
        )
    picture(
        summary.values(frontier, "step") and summary.values(frontier, "forget_prob"),
        "steps",
        "The same over the steps",
        "Probabilities are exp(−mean cross-entropy) of an answer's tokens, its end included, "
        "averaged over questions. Lower is better for forgotten answers, higher for all others.",
        figures.steps,
        results,
    )
    table(
        _examples(results.get("examples") or []),
        "Answers before and after",
        "Greedy answers to the same questions. Marked: word for word the original or the safe "
        "answer.",
    )
    table(
        _methods(results) + _metrics(results),
        "Evaluation",
        "Mean probabilities of answers, and whatever else was measured, at the end of every run.",
    )
    picture(
        any(row.get("spectrum") for row in subspaces),
        "spectrum",
        "Retain subspaces: spectrum and captured energy",
        "One column for each kind of input that linears read; a dot marks the rank Q of the "
        "subspace that updates stay out of. The captured energy is a certified lower bound.",
        subspace_figures.spectrum,
        [row for row in subspaces if row.get("spectrum")],
    )
    picture(
        summary.values(subspaces, "editability"),
        "editability",
        "Editability: the room left to forget in",
        "Share of the forget questions' activation energy outside the retain subspace. Near 0 % "
        "the adapter cannot reach what it should change; near 100 % the subspace protects little.",
        subspace_figures.editability,
        subspaces,
    )
    picture(
        summary.values(leakage, "leakage"),
        "leakage",
        "Leakage of the exported adapters",
        "How much of each folded adapter still points into its retain subspace.",
        subspace_figures.leakage,
        leakage,
    )
    picture(
        summary.loss_series(metrics),
        "losses",
        "Losses over the steps",
        "Unweighted parts of the objective as training logged them; mean over seeds thick.",
        figures.losses,
        metrics,
    )
    return sections, missing


def _header(title: str, results: Row, folder: RunFolder) -> str:
    facts = [f"run folder <code>{escape(folder.path.name)}</code>"]
    if number(results.get("seconds")) is not None:
        minutes, seconds = divmod(round(results["seconds"]), 60)
        facts.append(f"{minutes} min {seconds} s" if minutes else f"{seconds} s")
    facts += [escape(fact) for fact in _environment_facts(folder)]
    command = results.get("command")
    shown = f"<pre class=command>{escape(str(command))}</pre>" if command else ""
    return f"<header><h1>{escape(title)}</h1><p class=facts>{' · '.join(facts)}</p>{shown}</header>"


def _environment_facts(folder: RunFolder) -> list[str]:
    """Torch version, processor, commit and time, as far as environment.json has them."""
    try:
        environment = json.loads(folder.environment_path.read_text(encoding="utf-8"))
        gpus = [gpu["name"] for gpu in environment["cuda"]["gpus"]]
        commit = str(environment["commit"] or "unknown")
        changed = " with changes" if commit.endswith("-dirty") else ""
        return [
            f"torch {environment['packages']['torch']}",
            ", ".join(dict.fromkeys(gpus)) or environment["cpu"]["model"],
            f"commit {commit:.12}{changed}",
            environment["time"],
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _warnings(results: Row) -> str:
    found = summary.warnings(results)
    if not found:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    return f"<aside class=warnings><h2>⚠ Read this first</h2><ul>{items}</ul></aside>"


def _figure(picture: Picture) -> str:
    return (
        f"<section><h2>{escape(picture.title)}</h2><p>{escape(picture.caption)}</p>"
        f'<figure role="img" aria-label="{escape(picture.title)}">{picture.svg}</figure></section>'
    )


def _examples(examples: Sequence[Row]) -> str:
    shown = [
        m
        for m in ("before", "nsru", "lora", "after")
        if any(row.get(m) is not None for row in examples)
    ]
    if not shown:
        return ""
    head = "".join(f"<th scope=col>{escape(method_label(method))}</th>" for method in shown)
    groups = []
    for split in dict.fromkeys(str(row.get("split")) for row in examples):
        groups.append(
            f"<tr class=group><th colspan={len(shown) + 1}>{escape(split)} questions</th></tr>"
        )
        for row in examples:
            if str(row.get("split")) == split:
                cells = "".join(_answer(row, row.get(method)) for method in shown)
                groups.append(f"<tr><td class=question>{_question(row)}</td>{cells}</tr>")
    return (
        "<div class=scroll><table class=answers><thead><tr><th scope=col>Question</th>"
        f"{head}</tr></thead><tbody>{''.join(groups)}</tbody></table></div>"
    )


def _question(row: Row) -> str:
    parts = [f"<b>{escape(str(row.get('question', '')))}</b>"]
    for key, label in (("original", "Original answer"), ("safe_target", "Safe answer")):
        if row.get(key):
            parts.append(f"<small><i>{label}</i> {escape(str(row[key]))}</small>")
    return "".join(parts)


def _answer(row: Row, answer: Any) -> str:
    if answer is None:
        return "<td class=none>not generated</td>"
    text = str(answer).strip()
    for key, mark in (("original", "= original"), ("safe_target", "= safe answer")):
        if row.get(key) and text == str(row[key]).strip():
            return f"<td><span class='mark {key}'>{mark}</span>{escape(text)}</td>"
    return f"<td>{escape(text) or '<i>empty</i>'}</td>"


def _methods(results: Row) -> str:
    rows = results.get("methods") or []
    keys = [key for key in METHOD_COLUMNS if summary.values(rows, key)]
    if not keys:
        return ""
    body = [
        [
            method_label(method),
            str(row.get("seed", "")),
            *(_cell(key, row.get(key)) for key in keys),
        ]
        for method in ("before", *summary.method_names(rows))
        for row in summary.of_method(rows, method)
    ]
    return _numbers(["method", "seed", *(METHOD_COLUMNS[key][0] for key in keys)], body)


def _cell(key: str, value: Any) -> str:
    found = number(value)
    if found is None:
        return "–"
    return METHOD_COLUMNS[key][1].format(found / 2**20 if key == "peak_bytes" else found)


def _metrics(results: Row) -> str:
    """Two tables from {"metrics": {split: {metric: number}, overall metric: number}}."""
    metrics = results.get("metrics")
    if not isinstance(metrics, Mapping):
        return ""
    splits = {name: row for name, row in metrics.items() if isinstance(row, Mapping)}
    columns = list(dict.fromkeys(key for row in splits.values() for key in row))
    overall = {name: value for name, value in metrics.items() if number(value) is not None}
    tables = []
    if columns:
        head = ["split", *(METRICS.get(key, key.replace("_", " ")) for key in columns)]
        body = [[name, *(_short(row.get(key)) for key in columns)] for name, row in splits.items()]
        tables.append(_numbers(head, body))
    if overall:
        body = [[name.replace("_", " "), _short(value)] for name, value in overall.items()]
        tables.append(_numbers(["over all splits", "value"], body))
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in results.get("notes") or [])
    return "".join(tables) + (f"<ul class=notes>{notes}</ul>" if tables and notes else "")


def _numbers(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    columns = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    rows = "".join(
        f"<tr><th scope=row>{escape(str(first))}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for first, *cells in body
    )
    return (
        f"<div class=scroll><table class=numbers><thead><tr>{columns}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _short(value: Any) -> str:
    found = number(value)
    return "–" if found is None else f"{found:.4g}"


def _missing(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"<p class=missing>Not recorded in this run: {escape('; '.join(names))}.</p>"


def _details(title: str, path: Path) -> str:
    if not path.exists():
        return f"<p class=missing>{escape(title)}: not recorded.</p>"
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return f"<details><summary>{escape(title)}</summary><pre>{text}</pre></details>"
