"""The whole way on a small model made on the spot: memorise, estimate, unlearn, compare, report."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

import nsru_kernels as nk
from nsru_train.config import DataConfig, LoraConfig, ModelConfig, SubspaceConfig, TrainConfig
from nsru_train.data.records import QA
from nsru_train.data.safe_targets import SafeTargets
from nsru_train.demo.sets import Sets, fictitious_sets, tofu_sets
from nsru_train.demo.tiny_model import make_llama, memorise, train_tokenizer
from nsru_train.evaluate import Evaluation, evaluate, probability_sets
from nsru_train.losses.objective import Objective
from nsru_train.pipeline import Data, Outcome, find_subspaces, unlearn
from nsru_train.report import write_report
from nsru_train.report.summary import (
    FORGET_TARGET,
    RETAIN_TARGET,
    SAFE_TARGET,
    matched_damage,
)
from nsru_train.run_folder import RunFolder
from nsru_train.scoring import greedy_answers, quick_probabilities
from nsru_train.sources import save_records

METHODS = ("nsru", "lora")


@dataclass(frozen=True)
class Scale:
    """Sizes that suit a data set: the model, how it memorises, how often it is evaluated."""

    authors: int
    vocab_size: int
    hidden_size: int
    layers: int
    intermediate_size: int
    epochs: int
    lr: float
    bf16: bool
    eval_steps: int


# On a CPU with bf16 instructions bf16 was 1.9-2.1x as fast at hidden size 256, 0.94x at 128, where
# casts and launches outweigh the products.
FICTITIOUS = Scale(30, 1024, 128, 4, 352, epochs=60, lr=2e-3, bf16=False, eval_steps=10)
TOFU = Scale(40, 4096, 256, 5, 704, epochs=40, lr=1e-3, bf16=True, eval_steps=10)


def run_demo(
    out: str,
    *,
    data_dir: str | None,
    seeds: int,
    subspace: SubspaceConfig,
    lora: LoraConfig,
    objective: Objective,
    train: TrainConfig,
    examples: int,
    max_seconds: float,
    command: str,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the comparison, write results.json and report.html into ``out``; see ``nsru demo -h``."""
    started = time.perf_counter()
    run = RunFolder(out).lock()
    run.write_environment()
    scale = FICTITIOUS if data_dir is None else TOFU
    safe = SafeTargets.from_file()
    if data_dir is None:
        sets = fictitious_sets(scale.authors, safe)
    else:
        sets = tofu_sets(data_dir, scale.authors, safe)
    _write_run_config(run, sets, subspace, lora, objective, train)

    say(f"1/5  memorise {len(sets.memorised)} questions of {scale.authors} authors")
    model, tokenizer = base_model(run.path / "base", sets.memorised, scale, max_seconds, progress)
    probe = Probe(tokenizer, sets, safe)

    say("2/5  evaluate before, and estimate the retain subspaces")
    # Model utility needs wrong answers to compare with; TOFU has them for its first 400 rows.
    retain = [qa for qa in sets.retain if qa.perturbed_answers]
    splits = {"forget": sets.forget, "retain": retain, "holdout": sets.holdout}
    before = evaluate(model, tokenizer, splits, safe=safe, progress=progress)
    rows = [{"method": "before", "seed": 0, **probe(0, model), **_quality(before)}]
    subspaces = find_subspaces(
        model, tokenizer, sets.forget, [*sets.retain, *sets.retain_unseen], subspace,
        progress=progress,
    )  # fmt: skip
    subspaces.save(run.path / "subspaces")
    print(subspaces.table())

    say(f"3/5  unlearn with {' and '.join(METHODS)}, {seeds} seeds each, {train.steps} steps")
    frontier: list[dict[str, Any]] = []
    leakage: list[dict[str, Any]] = []
    answers: dict[str, list[str]] = {}
    shown = [*sets.forget[:examples], *sets.retain_unseen[: examples // 2]]
    data = Data(sets.forget, sets.retain, {}, safe)
    run.metrics_path.unlink(missing_ok=True)
    for seed in range(seeds):
        for method in METHODS:
            adapted, folder = copy.deepcopy(model), run.path / "runs" / f"{method}-{seed}"
            outcome = unlearn(
                adapted,
                tokenizer,
                data,
                folder,
                targets=subspace.targets,
                subspaces=subspaces,
                lora=replace(lora, project=method == "nsru"),
                objective=objective,
                train=replace(train, seed=seed, save_steps=0),
                on_eval=probe,
                eval_steps=scale.eval_steps,
                progress=progress,
            )
            label = {"method": method, "seed": seed}
            frontier += [{**label, **point} for point in outcome.evaluations]
            for line in RunFolder(folder).read_metrics():
                run.log_metrics({**label, **line})
            after = evaluate(adapted, tokenizer, splits, safe=safe, progress=progress)
            rows.append({**label, **_last_point(outcome), **_quality(after), **outcome.results()})
            print(f"  {method} seed {seed}: {_brief(rows[-1])}")
            if seed == 0:
                answers[method] = _answers(adapted, tokenizer, shown)
                if method == "nsru":
                    leakage = outcome.leakage
                    nk.save_lora_adapter(
                        adapted, run.adapter_dir, metadata={"fingerprint": subspaces.fingerprint}
                    )

    say("4/5  compare at equal forgetting")
    answers["before"] = _answers(model, tokenizer, shown)
    results: dict[str, Any] = {
        "schema": 1,
        "kind": "demo",
        "seconds": time.perf_counter() - started,
        "command": command,
        "setup": {
            "questions": {name: len(records) for name, records in vars(sets).items()},
            "model_parameters": sum(p.numel() for p in model.parameters()),
            "scale": asdict(scale),
            "lora": asdict(lora),
            "objective": asdict(objective),
            "train": asdict(train),
            "subspace": asdict(subspace),
        },
        "methods": rows,
        "frontier": frontier,
        "subspaces": [asdict(diagnostics) for diagnostics in subspaces.inputs],
        "leakage": leakage,
        "examples": _examples(shown, sets, safe, answers),
    }
    results["matched"] = matched_damage(results)
    for row in results["matched"]:
        print(
            f"  seed {row['seed']}: at forget_prob ≤ {row['forget_prob']:.3f} unseen retain answers"
            f" lost {row['nsru_damage']:.4f} (nsru) and {row['lora_damage']:.4f} (lora)"
        )
    for name, bound, reached in goals(rows):
        print(f"  nsru {name} {bound}: {'reached' if reached else 'MISSED'}")
    run.write_results(results)
    say("5/5  report")
    write_report(run.path)
    return results


def goals(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, bool]]:
    """(quantity, bound, whether every NSRU run is within it) for what the demo sets out to show."""
    before, *after = (row for row in rows if row["method"] in ("before", "nsru"))
    kept = RETAIN_TARGET * before["retain_prob"]
    return [
        (
            "forget_prob",
            f"≤ {FORGET_TARGET}",
            all(r["forget_prob"] <= FORGET_TARGET for r in after),
        ),
        ("safe_prob", f"≥ {SAFE_TARGET}", all(r["safe_prob"] >= SAFE_TARGET for r in after)),
        ("retain_prob", f"≥ {kept:.3f}", all(r["retain_prob"] >= kept for r in after)),
    ]


def base_model(
    folder: Path, records: Sequence[QA], scale: Scale, max_seconds: float, progress: bool
) -> tuple[nn.Module, Any]:
    """A Llama that knows ``records`` by heart, from ``folder`` when it was made there before."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = {"scale": asdict(scale), "records": [[qa.question, qa.answer] for qa in records]}
    recipe_file = folder / "recipe.json"
    if recipe_file.is_file() and json.loads(recipe_file.read_text()) == recipe:
        print(f"  using the model in {folder}")
        model = AutoModelForCausalLM.from_pretrained(folder)
        return model.eval(), AutoTokenizer.from_pretrained(folder)
    tokenizer = train_tokenizer([f"{qa.question} {qa.answer}" for qa in records], scale.vocab_size)
    model = make_llama(
        tokenizer,
        hidden_size=scale.hidden_size,
        layers=scale.layers,
        intermediate_size=scale.intermediate_size,
    )
    stats = memorise(
        model, tokenizer, records, epochs=scale.epochs, lr=scale.lr, bf16=scale.bf16,
        max_seconds=max_seconds, progress=progress,
    )  # fmt: skip
    print(
        f"  {model.num_parameters() / 1e6:.1f}M parameters, {stats['seconds']:.0f} s, "
        f"mean answer probability {stats['probability']:.3f}"
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    recipe_file.write_text(json.dumps(recipe))
    # As loaded, so that a first and a second run of the demo start from the same object.
    return AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer


class Probe:
    """Mean answer probabilities of a model on the demo's sets: a point of the frontier."""

    def __init__(self, tokenizer, sets: Sets, safe: SafeTargets):
        self.tokenizer = tokenizer
        self.sets = probability_sets(tokenizer, vars(sets), safe)

    def __call__(self, step: int, model: nn.Module) -> Mapping[str, float]:
        return quick_probabilities(model, self.tokenizer, self.sets)


def say(line: str) -> None:
    """A line that a reader of the log finds again."""
    print(f"\n{line}", flush=True)


def _quality(evaluation: Evaluation) -> dict[str, Any]:
    forget, retain = evaluation.metrics["forget"], evaluation.metrics["retain"]
    kept = (
        "rougeL_recall",
        "truth_ratio",
        "extraction_strength",
        "exact_memorisation",
        "safe_rougeL_recall",
    )
    return {
        **evaluation.overall,
        "model_utility_splits": list(evaluation.utility_splits),
        **{f"forget_{name}": forget[name] for name in kept if name in forget},
        **{f"retain_{name}": retain[name] for name in kept if name in retain},
    }


def _last_point(outcome: Outcome) -> dict[str, Any]:
    return {k: v for k, v in outcome.evaluations[-1].items() if k != "step"}


def _brief(row: Mapping[str, Any]) -> str:
    names = (
        "forget_prob",
        "safe_prob",
        "retain_prob",
        "retain_unseen_prob",
        "retain_untouched_prob",
    )
    return ", ".join(f"{name.removesuffix('_prob')} {row[name]:.3f}" for name in names)


def _answers(model: nn.Module, tokenizer, records: Sequence[QA]) -> list[str]:
    return greedy_answers(model, tokenizer, [qa.question for qa in records], max_new_tokens=80)


def _examples(
    shown: Sequence[QA], sets: Sets, safe: SafeTargets, answers: Mapping[str, list[str]]
) -> list[dict[str, Any]]:
    return [
        {
            "split": "forget" if qa in sets.forget else "retain_unseen",
            "question": qa.question,
            "original": qa.answer,
            "safe_target": safe.target(qa) if qa in sets.forget else None,
            **{method: texts[i] for method, texts in answers.items()},
        }
        for i, qa in enumerate(shown)
    ]


def _write_run_config(
    run: RunFolder,
    sets: Sets,
    subspace: SubspaceConfig,
    lora: LoraConfig,
    objective: Objective,
    train: TrainConfig,
) -> None:
    """config.yaml and data files with which every other command works on this folder."""
    files = {}
    for name, records in vars(sets).items():
        files[name] = str(run.path / "data" / f"{name}.jsonl")
        save_records(files[name], records)
    data = DataConfig(
        files["forget"],
        files["retain"],
        more={"retain_unseen": files["retain_unseen"], "holdout": files["holdout"]},
    )
    run.write_config(
        {
            "model": asdict(ModelConfig(str(run.path / "base"))),
            "data": asdict(data),
            "subspace": asdict(replace(subspace, path=str(run.path / "subspaces"))),
            "lora": asdict(lora),
            "objective": asdict(objective),
            "train": asdict(train),
        }
    )
