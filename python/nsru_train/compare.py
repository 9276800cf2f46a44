"""Methods from one base model: at several rates and seeds, resumed, and judged alike."""

from __future__ import annotations

import copy
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from nsru_kernels.checks import check_range
from nsru_kernels.files import check_fields
from nsru_kernels.subspaces.collection import SubspaceSet
from nsru_train.adapters import load_adapter, save_adapter
from nsru_train.alternatives import add_alternatives
from nsru_train.answering import greedy_answers
from nsru_train.callbacks import GradientError
from nsru_train.config import DataConfig, LoraConfig, ModelConfig, SubspaceConfig, TrainConfig
from nsru_train.data.encode import encode_prompt, prompt_text
from nsru_train.estimating import run_subspaces
from nsru_train.evaluation import evaluate, probability_sets, watched
from nsru_train.loading import Data, load_data, load_model, without_long
from nsru_train.methods import Method, check_records, find_method, method_of_run, run_name
from nsru_train.metrics import open_unlearning
from nsru_train.own_texts import add_own_requests
from nsru_train.pipeline import check_layers, check_training, kept_point, unlearn
from nsru_train.report import write_report
from nsru_train.report.summary import FORGET_TARGET, matched_damage
from nsru_train.run_config import check_same_run, keep_date
from nsru_train.run_folder import RunFolder
from nsru_train.scoring import quick_probabilities

logger = logging.getLogger(__name__)

QUALITY = (
    "rougeL_recall",
    "truth_ratio",
    "extraction_strength",
    "exact_memorisation",
    "safe_rougeL_recall",
)
KNOWLEDGE = ("option_probability", "exact_memorisation")
GENERAL = ("real_authors", "world_facts")
# What the comparison reads of each point of a frontier.
_POINT = {
    **dict.fromkeys(("lr", "forget_prob", "safe_prob", "retain_unseen_prob"), float),
    "method": str,
    "step": int,
}


@dataclass(frozen=True)
class Contender:
    """A method with its settings, and whether its update is projected."""

    name: str
    method: Method
    project: bool
    found: str  # by `find_method`

    @classmethod
    def named(cls, name: str, settings: Mapping[str, Any]) -> Contender:
        """By what results call it: "npo", "npo projected", "nsru", or "lora", NSRU unprojected.

        Raises:
            ValueError: an unknown method, or settings that it does not have.
        """
        if name == "before":
            raise ValueError("methods: 'before' is the base model; call your class otherwise.")
        method, project = method_of_run(name)
        if " " in method:
            raise ValueError(f'methods: expected a name, or "NAME projected", got {name!r}.')
        found = find_method(method)
        if project and not found.trains:
            raise ValueError(f"methods: {method} trains nothing to project, give it as {method}.")
        try:
            return cls(run_name(method, project), found(**settings), project, method)
        except TypeError as error:
            known = [field.name for field in fields(found)]
            odd = ", ".join(sorted(settings.keys() - known))
            raise ValueError(f"settings: {name} has {', '.join(known)}, got {odd}.") from error
        except ValueError as error:
            raise ValueError(f"settings: {name}: {error}") from error

    def rates(self, lrs: Mapping[str, Sequence[float]], default: float) -> Sequence[float]:
        """The learning rates to try; 0 where nothing is trained."""
        return lrs.get(self.name, [default]) if self.method.trains else [0.0]


@dataclass
class Comparison:
    """Runs of several methods from one base model, each kept in a folder of its own."""

    run: RunFolder
    base: nn.Module
    tokenizer: Any
    data: Data
    subspaces: SubspaceSet
    layers: SubspaceConfig
    lora: LoraConfig
    train: TrainConfig
    eval_steps: int
    stop: float | None
    probed: int | None
    examples: int
    resume: bool
    progress: bool
    max_length: int = 512
    sections: Mapping[str, Any] = field(default_factory=dict)  # model and data, to be saved

    def __post_init__(self) -> None:
        self._started = time.time()
        splits = {k: v for k, v in self.data.splits().items() if v and k not in GENERAL}
        self._probed = probability_sets(
            self.tokenizer, splits, self.data.safe, max_length=self.max_length, limit=self.probed
        )
        self._shown = [
            *self.data.forget[: self.examples],
            *self.data.more["retain_unseen"][: self.examples // 2],
        ]
        self._start: dict[str, float] = {}

    def counts(self) -> dict[str, dict[str, int]]:
        """Counts of each set: the questions that probabilities are means of, and all of them."""
        sizes = {name: len(records) for name, records in self.data.splits().items() if records}
        asked = {name: len(self._probed.get(f"{name}_prob", ())) or sizes[name] for name in sizes}
        return {"questions": asked, "sizes": sizes}

    def probe(self, model: nn.Module, method: Method | None = None) -> dict[str, float]:
        """A point of the frontier: mean answer probabilities, and what the method watches."""
        sets = self._probed if method is None else watched(method, self._probed)
        return quick_probabilities(model, self.tokenizer, sets)

    def before(self) -> dict[str, Any]:
        """The base model's row."""
        folder = RunFolder(self.run.path / "runs" / "before")
        if not self._done(folder):
            self._start = self.probe(self.base)
            row = {"method": "before", "seed": 0, **self._start, **self._quality(self.base)}
            folder.write_results(
                {"row": row, "start": self._start, "answers": self._say(self.base)}
            )
        kept = folder.read_results(row=dict, start=dict[str, float])
        self._start = kept["start"]
        return kept["row"]

    def is_enough(self, point: Mapping[str, float]) -> bool:
        """True where a point of the frontier has forgotten, and says the safe answer instead."""
        if self.stop is None:
            return point["forget_prob"] <= FORGET_TARGET
        return point["forget_prob"] <= self.stop and point["safe_prob"] >= 1 - self.stop

    def unlearn(self, contender: Contender, lr: float, seed: int) -> dict[str, Any]:
        """Train one adapter, or take the one trained before: its frontier, leakage and times."""
        name = contender.name.replace(" ", "-")
        folder = RunFolder(self.run.path / "runs" / f"{name}-{lr:g}-{seed}")
        if not self._done(folder):
            adapted = copy.deepcopy(self.base)
            method = contender.method
            lora = replace(self.lora, project=contender.project)
            train = replace(self.train, lr=lr, seed=seed, save_steps=0)
            if self.sections:
                own = {"subspace": asdict(self.layers), "lora": asdict(lora)}
                own |= {"objective": asdict(method), "train": asdict(train)}
                folder.write_config({**self.sections, "method": contender.found, **own})
            outcome = unlearn(
                adapted,
                self.tokenizer,
                self.data,
                folder.path,
                targets=self.layers.targets,
                exclude=self.layers.exclude,
                subspaces=self.subspaces,
                lora=lora,
                objective=method,
                train=train,
                on_eval=lambda step, model: (
                    # Before the first step an adapter is zero.
                    self.probe(model, method) if step or method.keeps_best else self._start
                ),
                max_length=self.max_length,
                eval_steps=self.eval_steps,
                stop_at=self.is_enough if self.stop is not None else None,
                progress=self.progress,
            )
            label = {"method": contender.name, "lr": lr, "seed": seed}
            save_adapter(
                adapted,
                folder.adapter_dir,
                method,
                fingerprint=self.subspaces.fingerprint,
            )
            folder.write_results(
                {
                    **label,
                    "frontier": [{**label, **point} for point in outcome.evaluations],
                    "leakage": list(outcome.leakage),
                    "outcome": outcome.results(),
                }
            )
        kept = folder.read_results(frontier=list[dict], leakage=list[dict], outcome=dict)
        for point in kept["frontier"]:
            check_fields(folder.results_path, point, _POINT)
        step = kept["outcome"].get("kept_step")
        if lr and step is not None:  # the others are no model that this method gives
            kept["frontier"] = [p for p in kept["frontier"] if p["step"] in (0, step)]
        return {**kept, "folder": str(folder.path)}

    def judge(self, trained: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the results: the kept or last point of the frontier, how the adapter answers."""
        folder = RunFolder(Path(trained["folder"], "judged"))
        if not self._done(folder):
            adapted = copy.deepcopy(self.base)
            load_adapter(adapted, Path(trained["folder"], "adapter"), self.tokenizer)
            outcome, points = trained["outcome"], trained["frontier"]
            row = {
                **kept_point(points, outcome.get("kept_step")),
                **self._quality(adapted),
                **outcome,
            }
            folder.write_results({"row": row, "answers": self._say(adapted)})
        return {**folder.read_results(row=dict)["row"], **_robustness(trained["folder"])}

    def answers(self, shown: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Questions with the answers of the base model and of the runs shown."""
        folders = {"before": self.run.path / "runs" / "before"}
        folders |= {one["method"]: Path(one["folder"], "judged") for one in shown}
        answers = {
            name: RunFolder(path).read_results(answers=list[str])["answers"]
            for name, path in folders.items()
        }
        return [
            {
                "split": "forget" if qa in self.data.forget else "retain_unseen",
                "question": qa.question,
                "original": qa.answer,
                "safe_target": self.data.safe.target(qa) if qa in self.data.forget else None,
                **{name: texts[i] for name, texts in answers.items()},
            }
            for i, qa in enumerate(self._shown)
        ]

    def _done(self, folder: RunFolder) -> bool:
        """True where this command made the folder's results, or an earlier one that goes on."""
        path = folder.results_path
        return path.exists() and (self.resume or path.stat().st_mtime >= self._started)

    def _say(self, model: nn.Module) -> list[str]:
        questions = [qa.question for qa in self._shown]
        return greedy_answers(model, self.tokenizer, questions, max_new_tokens=80)

    def _quality(self, model: nn.Module) -> dict[str, Any]:
        # Model utility needs wrong answers to compare with; TOFU has them for its first 400 rows.
        splits = {
            "forget": self.data.forget,
            "retain": [qa for qa in self.data.retain if qa.perturbed_answers],
            "holdout": self.data.more.get("holdout", []),
        }
        splits = {name: records for name, records in splits.items() if records}
        options: dict[str, Any] = {"max_length": self.max_length, "progress": self.progress}
        found = evaluate(model, self.tokenizer, splits, safe=self.data.safe, **options)
        row = {**found.overall, "model_utility_splits": list(found.utility_splits)}
        for split in ("forget", "retain"):
            metrics = found.metrics.get(split, {})
            row |= {f"{split}_{name}": metrics[name] for name in QUALITY if name in metrics}
        if general := {name: self.data.more[name] for name in GENERAL if name in self.data.more}:
            known = evaluate(model, self.tokenizer, general, generate=False, progress=self.progress)
            for split, metrics in known.metrics.items():
                row |= {f"{split}_{name}": metrics[name] for name in KNOWLEDGE if name in metrics}
        return row


def _robustness(folder: str) -> dict[str, float]:
    """Findings of `nsru attack` on a run, where it was asked."""
    attacked = Path(folder, "attack", "results.json")
    rows = RunFolder(attacked.parent).read_results()["methods"] if attacked.is_file() else []
    return {k: v for row in rows for k, v in row.items() if k.startswith("robustness")}


def check_plan(
    lrs: Mapping[str, Sequence[float]],
    seeds: int,
    examples: int,
    probed: int | None,
    stop: float | None,
) -> None:
    """Raise ValueError, before anything takes time, for what no comparison can do."""
    for name, rates in lrs.items():
        if not rates:
            raise ValueError(f"lrs: {name} must list learning rates, got none; leave it out.")
        for rate in rates:
            check_range(f"lrs: {name}", rate, "must not be negative")
    check_range("seeds", seeds, "must be ≥ 1", whole=True)
    check_range("examples", examples, "must not be negative", whole=True)
    if probed is not None:
        check_range("probed", probed, "must be ≥ 1", whole=True)
    if stop is not None:
        check_range("stop", stop, "must be a share from 0 to 1")


def compare(
    comparison: Comparison,
    contenders: Sequence[Contender],
    lrs: Mapping[str, Sequence[float]],
    seeds: int,
) -> dict[str, Any]:
    """Tune each contender with seed 0, train it with every seed, judge all: parts of results.json.

    Args:
        lrs: learning rates of a contender, by name; one without any has ``comparison.train.lr``, or
            none where it trains nothing.
    """
    rows = [comparison.before()]
    tuning = [
        one
        for contender in contenders
        for lr in contender.rates(lrs, comparison.train.lr)
        if (one := _attempt(comparison, contender, lr, 0))
    ]
    points = [point for one in tuning for point in one["frontier"]]
    contenders = [c for c in contenders if any(one["method"] == c.name for one in tuning)]
    best = {c.name: best_lr(points, c.name, comparison.is_enough) for c in contenders}
    trained = [
        one
        for seed in range(seeds)
        for contender in contenders
        if (one := _attempt(comparison, contender, best[contender.name], seed))
    ]
    if not trained:
        raise ValueError("lrs: no method could be trained at any rate; lower them.")
    run = comparison.run
    for one in trained:
        rows.append(comparison.judge(one))
        print(f"  {one['method']} seed {one['seed']}, lr {one['lr']:g}: {_brief(rows[-1])}")
    run.metrics_path.unlink(missing_ok=True)
    for one in trained:
        for line in RunFolder(one["folder"]).read_metrics():
            run.log_metrics({"method": one["method"], "seed": one["seed"], **line})
    shutil.copytree(Path(trained[0]["folder"], "adapter"), run.adapter_dir, dirs_exist_ok=True)
    results = {
        "methods": rows,
        "frontier": [point for one in trained for point in one["frontier"]],
        "tuning": points if lrs else [],
        "lr": best,
        "subspaces": [asdict(diagnostics) for diagnostics in comparison.subspaces.inputs],
        "leakage": trained[0]["leakage"],
        "examples": comparison.answers([one for one in trained if one["seed"] == 0]),
    }
    results["matched"] = matched_damage(results)
    for row in results["matched"]:
        lost = ", ".join(
            f"{damage:.4f} ({name.removesuffix('_damage')})"
            for name, damage in row.items()
            if name.endswith("_damage")
        )
        print(
            f"  seed {row['seed']}: at forget_prob ≤ {row['forget_prob']:.3f} unseen retain answers"
            f" lost {lost}"
        )
    return results


def _attempt(
    comparison: Comparison, contender: Contender, lr: float, seed: int
) -> dict[str, Any] | None:
    """The run, or None where it diverged at once: no reason to lose the others."""
    try:
        return comparison.unlearn(contender, lr, seed)
    except GradientError as error:
        print(f"  {contender.name} seed {seed}, lr {lr:g}: left out, {error}")
        return None


def _brief(row: Mapping[str, Any]) -> str:
    names = ("forget", "safe", "retain", "retain_unseen", "retain_untouched")
    return ", ".join(f"{n} {row[f'{n}_prob']:.3f}" for n in names if f"{n}_prob" in row)


def best_lr(
    points: Sequence[Mapping[str, Any]],
    method: str,
    is_enough: Callable[[Mapping[str, float]], bool],
) -> float:
    """The learning rate with the least damage to unseen answers where a point is enough.

    points are the ``frontier`` rows of runs at several rates; where none got so far, the rate that
    forgot most.
    """
    own = [point for point in points if point["method"] == method]
    if reached := [point for point in own if is_enough(point)]:
        return max(reached, key=lambda point: point["retain_unseen_prob"])["lr"]
    return min(own, key=lambda point: point["forget_prob"])["lr"]


def read_logs(
    paths: Mapping[str, str], data: Data
) -> tuple[dict[str, Mapping[str, Any]], list[dict[str, Any]], list[str]]:
    """OpenUnlearning's logs by name, a row for each, and what has to be said of them.

    Raises:
        ValueError: one is damaged, or of another forget set.
    """
    records = {
        name: [(qa.question, qa.answer) for qa in getattr(data, name)]
        for name in ("forget", "retain")
    }
    logs: dict[str, Mapping[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    notes = []
    for name, path in paths.items():
        try:
            log = logs[name] = open_unlearning.read_log(path)
            rows.append({"method": name, **open_unlearning.comparison_row(log, records)})
        except ValueError as error:
            raise ValueError(f"logs: {name}: {error}") from error
        if open_unlearning.same_questions(log, "forget", records["forget"]) is None:
            notes.append(f"{name}: it holds no texts, so its questions may be others than these.")
        elif open_unlearning.same_questions(log, "retain", records["retain"]) is not True:
            notes.append(
                f"{name}: its retain questions are not, or not known to be, those compared here. "
                "Its model_utility is of its own sets, and its retain answers are left out."
            )
    return logs, rows, notes


def of_other_models(
    logs: Mapping[str, Mapping[str, Any]], tokenizer: Any, question: str
) -> list[str]:
    """A note on each of OpenUnlearning's logs whose prompts this tokenizer does not write."""
    own = tokenizer.decode(encode_prompt(tokenizer, question), skip_special_tokens=True)
    notes = []
    for name, log in logs.items():
        for prompt, _ in open_unlearning.texts(log, "forget")[:1]:
            if prompt != question and "".join(prompt.split()) != "".join(own.split()):
                notes.append(
                    f"{name}: it asks by {prompt[:60]!r}, this model by {own[:60]!r}: a log of "
                    "another model?"
                )
    return notes


def run_compare(
    out: str,
    *,
    model: ModelConfig,
    data: DataConfig,
    subspace: SubspaceConfig,
    lora: LoraConfig,
    methods: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]],
    lrs: Sequence[float],
    seeds: int,
    train: TrainConfig,
    stop: float | None,
    probed: int | None,
    examples: int,
    logs: Mapping[str, str],
    resume: bool,
    command: str,
) -> None:
    """Compare, and write results.json and report.html into ``out``; see ``nsru compare --help``."""
    started = time.perf_counter()
    contenders = [Contender.named(name, settings.get(name, {})) for name in methods]
    lrs = list(dict.fromkeys(lrs))
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"methods: expected methods of distinct names, got {', '.join(names)}.")
    rates = dict.fromkeys(names, lrs) if lrs else {}
    check_plan(rates, seeds, examples, probed, stop)
    if unknown := sorted(settings.keys() - set(methods)):
        raise ValueError(f"settings: {unknown[0]!r} is none of the methods, {', '.join(methods)}.")
    for contender in contenders:
        contender.method.check_weights()
    check_training(train)
    if clash := sorted({"before", *names} & logs.keys()):
        raise ValueError(f"logs: {clash[0]!r} is the name of another row; give another one.")
    loaded = load_data(data)
    digests = loaded.digests()
    check_records(
        [contender.method for contender in contenders], loaded.forget, loaded.retain,
        written=bool(data.write_alternatives),
    )  # fmt: skip
    found_logs, log_rows, notes = read_logs(logs, loaded)
    if "retain_unseen" not in loaded.more:
        if len(loaded.retain) < 2:
            raise ValueError("data.retain: expected two questions or more, one of them unseen.")
        loaded.more["retain_unseen"], loaded.retain = loaded.retain[1::2], loaded.retain[::2]
        if found_logs:
            notes.append("Retain answers of the logs are all of them, of the methods every other.")
        print("data.more has no retain_unseen: the retain loss sees every other retain question.")
    if found_logs and probed is not None and probed < max(len(loaded.forget), len(loaded.retain)):
        notes.append(
            f"Probabilities of the logs are over all their questions, those of the methods over "
            f"{probed} of each set; --probed null takes all."
        )
    run = RunFolder(out).lock()
    if run.results_path.exists() and not resume:
        raise ValueError(f"out: {out} holds a comparison; give another folder, or --resume true.")
    if not resume and (begun := len([*run.path.glob("runs/*/results.json")])):
        raise ValueError(
            f"out: {out} holds {begun} finished runs of a comparison that was interrupted; "
            f"--resume true goes on with them, or remove {out}/runs to begin anew."
        )
    if resume:
        keep_date(run.config_path, data)
    config = {
        "model": asdict(model),
        "data": asdict(data),
        "subspace": asdict(subspace),
        "lora": asdict(lora),
        "train": asdict(train),
        "methods": {c.name: {**asdict(c.method), "project": c.project} for c in contenders},
        "compare": {"stop": stop, "probed": probed, "sets": digests},
    }
    if resume:
        check_same_run(run.config_path, config, growing="methods")
    base, tokenizer = load_model(model, data)
    config["data"] = asdict(data)
    config["compare"]["prompt"] = prompt_text(tokenizer, "{}")
    if resume:
        check_same_run(run.config_path, config, growing="methods")
    notes += of_other_models(found_logs, tokenizer, loaded.forget[0].question)
    for note in notes:
        logger.warning("logs: %s", note)
    loaded = without_long(loaded, tokenizer, data)
    check_layers(base, subspace, lora, [contender.method for contender in contenders])
    loaded.forget = add_alternatives(
        base, tokenizer, loaded.forget, data, [c.method for c in contenders],
        run.path / "alternatives.jsonl",
    )  # fmt: skip
    add_own_requests(base, tokenizer, loaded, data, run.path / "own_requests.jsonl", keep=resume)
    run.write_config(config)
    run.write_environment()
    subspaces = run_subspaces(
        run, base, tokenizer, loaded.forget, [*loaded.kept, *loaded.more["retain_unseen"]],
        subspace, resume=resume, max_length=data.max_length,
    )  # fmt: skip
    print(subspaces.table())
    comparison = Comparison(
        run, base, tokenizer, loaded, subspaces, subspace, lora, train, train.eval_steps or 10,
        stop, probed, examples, resume, progress=True, max_length=data.max_length,
        sections={"model": config["model"], "data": config["data"]},
    )  # fmt: skip
    found = compare(comparison, contenders, rates, seeds)
    setup = {
        **comparison.counts(),
        "sets": digests,
        "model_parameters": sum(p.numel() for p in base.parameters()),
        **config,
        "lr": found.pop("lr"),
        "logs": dict(logs),
    }
    found["methods"] += log_rows
    run.write_results(
        {
            "schema": 1,
            "kind": "compare",
            "seconds": time.perf_counter() - started,
            "command": command,
            "setup": setup,
            "notes": notes,
            **found,
        }
    )
    write_report(run.path)
