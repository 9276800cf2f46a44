"""The report page: what a run recorded, as figures and tables, filled into report.html.j2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from nsru_kernels.files import atomic_write, parse_json, read_text
from nsru_train.run_folder import RunFolder

from . import figures, summary, tables
from .theme import COLOURS, draw


def write_report(run: str | Path | RunFolder) -> Path:
    """Write report.html and figures/*.png of a run from its results.json and metrics.jsonl.

    Parts that the run did not record are named at the end of the page, but for those of training
    where the run is an evaluation.

    Args:
        run: the run folder.

    Returns:
        Path of report.html.

    Raises:
        FileNotFoundError: no results.json.
        ValueError: results.json is damaged or of another schema.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    results, metrics = folder.read_results(), folder.read_metrics()
    frontier, subspaces, leakage = (
        results.get(key) or [] for key in ("frontier", "subspaces", "leakage")
    )
    methods = summary.method_names([*(results.get("methods") or []), *frontier])
    plotted = summary.method_names(frontier)
    plotted = [name for name in methods if name in plotted]  # rows of a log have no steps
    probabilities = summary.curves(frontier, summary.PROBABILITIES)
    losses = summary.loss_series(metrics)
    spectra = [row for row in subspaces if row.get("spectrum")]
    few = len(plotted) <= summary.FEW_METHODS
    compared = figures.frontier if few else figures.damage
    # Name of the figure -> whether the run has data for it, how it is drawn, and of what.
    plots: dict[str, tuple[Any, ...]] = {
        name: (summary.runs(frontier, "forget_prob", key), compared, results, key, plotted)
        for key, name in summary.DAMAGE_FIGURES.items()
    }
    useful = summary.ends(results, "forget_prob", "model_utility")
    if not few and (best := summary.best_few(results)):
        shown = {**results, "frontier": [row for row in frontier if row.get("method") in best]}
        key = next(iter(summary.DAMAGE_FIGURES))
        plots["frontier-best"] = (True, figures.frontier, shown, key, best)
        plots["utility-best"] = ({*best} <= {*useful}, figures.utility, results, best)
    editable = summary.values(subspaces, "editability")
    leaking = summary.values(leakage, "leakage")
    plots |= {
        "utility": (useful, figures.utility, results, list(useful)),
        "steps": (few and probabilities, figures.steps, results, plotted),
        "losses": (few and losses, figures.losses, losses, methods),
        "spectrum": (spectra, figures.spectrum, spectra),
        "editability": (editable, figures.editability, subspaces),
        "leakage": (leaking, figures.leakage, leakage, methods),
    }
    drawn = {
        name: Markup(draw(folder.figures_dir, name, plot, *data))
        for name, (found, plot, *data) in plots.items()
        if found
    }
    templates = Environment(
        loader=PackageLoader("nsru_train", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("report.html.j2").render(
        results=results,
        figures=drawn,
        tables=tables,
        colours=COLOURS,
        facts=_facts(results, folder),
        warnings=summary.warnings(results),
        methods=methods,
        few=few,
        level=max((row["forget_prob"] for row in summary.matched_damage(results)), default=0),
        target=summary.FORGET_TARGET,
        label=summary.label,
        names=summary.PROBABILITIES,
        probabilities=probabilities,
        losses=losses,
        files={
            "Configuration (config.yaml)": _text(folder.config_path),
            "Environment (environment.json)": _text(folder.environment_path),
        },
        missing=[],
    )
    # JSON can hold half a surrogate pair, which UTF-8 cannot.
    return atomic_write(folder.report_path, page.encode(errors="replace"))


def _facts(results: summary.Row, folder: RunFolder) -> list[str]:
    """Run time, versions, processor, commit and date, as far as they were recorded."""
    facts = [f"run folder {folder.path.name}"]
    if summary.number(results.get("seconds")) is not None:
        minutes, seconds = divmod(round(results["seconds"]), 60)
        facts.append(f"{minutes} min {seconds} s" if minutes else f"{seconds} s")
    try:
        environment = parse_json(read_text(folder.environment_path))
        gpus = dict.fromkeys(gpu["name"] for gpu in environment["cuda"]["gpus"])
        commit = str(environment["commit"] or "")  # none where it was installed without git
        changed = " with changes" if commit.endswith("-dirty") else ""
        return [
            *facts,
            f"torch {environment['packages']['torch']}",
            ", ".join(gpus) or environment["cpu"]["model"],
            *([f"commit {commit:.12}{changed}"] if commit else []),
            environment["time"],
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return facts


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
