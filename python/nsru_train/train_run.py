"""``nsru train``: a run from its settings to adapter, results.json and report."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm
from transformers.trainer_utils import get_last_checkpoint

from nsru_kernels.nn.sharded import shards_of
from nsru_kernels.subspaces.collection import SubspaceSet, fingerprint_weights
from nsru_train.adapters import save_adapter
from nsru_train.alternatives import add_alternatives
from nsru_train.config import DataConfig, LoraConfig, ModelConfig, SubspaceConfig, TrainConfig
from nsru_train.estimating import run_subspaces
from nsru_train.eval_results import format_probabilities, probability_line
from nsru_train.evaluation import before_and_after, probability_sets, quick_probabilities, watched
from nsru_train.loading import Data, load_data, load_model, without_long
from nsru_train.methods import Method, check_records, run_name
from nsru_train.ordinary import describe_ordinary, ordinary_answers
from nsru_train.own_texts import add_own_requests
from nsru_train.pipeline import check_layers, check_training, unlearn
from nsru_train.report import write_report
from nsru_train.run_config import adapter_digest, check_same_run, keep_date
from nsru_train.run_folder import RunFolder
from nsru_train.trainer import inside_forward

# Of one set: enough for means that hold to about a percent, at the cost of a few training steps.
QUESTIONS_BEFORE_AND_AFTER = 200


def run_train(
    out: str,
    *,
    model: ModelConfig,
    data: DataConfig,
    subspace: SubspaceConfig,
    lora: LoraConfig,
    method: str,
    objective: Method,
    train: TrainConfig,
    resume: bool,
) -> bool:
    """Train, and write adapter, results.json and report.html into ``out``; see ``nsru train -h``.

    Returns:
        Whether this process is the one that wrote them.
    """
    objective.check_weights()
    check_training(train)
    loaded = load_data(data)
    digests = loaded.digests()
    check_records([objective], loaded.forget, loaded.retain, written=bool(data.write_alternatives))
    run = RunFolder(out).lock()
    last = _last_checkpoint(run, resume)
    own = run.path / "subspaces"
    estimated = (own / "index.json").is_file()
    if resume and last is None:
        remedy = f" Its retain subspaces are whole: --subspace.path {own} takes them."
        whole = estimated and subspace.path is None
        print(f"resume: {out} has no checkpoint yet; starting anew.{remedy * whole}")
    if last is not None:
        keep_date(run.config_path, data)
    config = {
        "model": asdict(model),
        "data": asdict(data),
        "subspace": asdict(subspace),
        "lora": asdict(lora),
        "method": method,
        "objective": asdict(objective),
        "train": asdict(train),
        "out": out,
    }
    if last is not None:
        check_same_run(run.config_path, config)
        print(f"resume: going on from {last}.")
    started = time.perf_counter()
    base, tokenizer = load_model(model, data)
    config["data"] = asdict(data)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=base.device.type == "cpu")  # makes the process group
    loaded = without_long(loaded, tokenizer, data)
    check_layers(base, subspace, lora, [objective])
    loaded.forget = add_alternatives(
        base, tokenizer, loaded.forget, data, [objective], run.path / "alternatives.jsonl",
        progress=run.writes,
    )  # fmt: skip
    asked = probability_sets(
        tokenizer, loaded.splits(), loaded.safe,
        max_length=data.max_length, limit=QUESTIONS_BEFORE_AND_AFTER,
    )  # fmt: skip
    add_own_requests(
        base, tokenizer, loaded, data, run.path / "own_requests.jsonl",
        keep=last is not None, progress=run.writes,
    )  # fmt: skip
    run.write_config(config)
    run.write_environment()
    project = lora.project and objective.trains
    subspaces: SubspaceSet | None = None
    if project:
        subspaces = run_subspaces(
            run, base, tokenizer, loaded.forget, loaded.kept, subspace,
            resume=last is not None, max_length=data.max_length, progress=run.writes,
        )  # fmt: skip
        print(subspaces.table(most=8))  # the report has them all
    fingerprint = fingerprint_weights(base)  # before they are sharded

    def look(step: int, model: nn.Module) -> dict[str, float]:
        found = quick_probabilities(model, tokenizer, watched(objective, asked))
        if run.writes:
            tqdm.write(probability_line(step, found))  # print would tear the progress bar
        return found

    outcome = unlearn(
        base,
        tokenizer,
        loaded,
        run.path,
        targets=subspace.targets,
        exclude=subspace.exclude,
        subspaces=subspaces,
        lora=lora,
        objective=objective,
        train=train,
        max_length=data.max_length,
        resume=last is not None,
        on_eval=look if train.eval_steps or objective.keeps_best else None,
        eval_steps=train.eval_steps or 10,
    )
    print(outcome)
    sharded = bool(shards_of(base))  # then every process takes part
    if not (run.writes or sharded):
        return False
    save_adapter(base, run.adapter_dir, objective, fingerprint=fingerprint)
    if sharded:
        before, after = inside_forward(
            base, lambda model: before_and_after(model, tokenizer, asked, progress=run.writes)
        )
    else:
        before, after = before_and_after(base, tokenizer, asked, progress=True)
    if not run.writes:
        return False
    ordinary = _ask_ordinary(base, tokenizer, loaded)
    print(format_probabilities({"before": before, "after": after}))
    if ordinary:
        print(describe_ordinary(ordinary))
    label = {"method": run_name(method, project), "seed": train.seed}
    run.write_results(
        {
            "kind": "train",
            "seconds": time.perf_counter() - started,
            "setup": {
                "questions": {n.removesuffix("_prob"): len(asked[n]) for n in asked},
                "sets": digests,
                "adapter": adapter_digest(run.adapter_dir),
            },
            "methods": [
                {"method": "before", "seed": train.seed, **before},
                {**label, **after, **outcome.results()},
            ],
            "subspaces": [asdict(row) for row in subspaces.inputs] if subspaces is not None else [],
            "leakage": outcome.leakage,
            "frontier": [{**label, **point} for point in outcome.evaluations],
            "ordinary": ordinary,
            "examples": [
                {"split": "ordinary", **{key: row[key] for key in ("question", "before", "after")}}
                for row in ordinary
            ],
        }
    )
    write_report(run.path)
    return True


def _last_checkpoint(run: RunFolder, resume: bool) -> str | None:
    """To go on from.

    Raises:
        ValueError: the folder holds a run that this one would overwrite.
    """
    last = get_last_checkpoint(run.path)
    if last is not None and not resume:
        raise ValueError(
            f"out: {run.path} holds checkpoints of an earlier run; add --resume true to go on from "
            f"{Path(last).name}, or give another folder."
        )
    if last is None and run.results_path.exists():
        raise ValueError(
            f"out: {run.path} holds a finished run without checkpoints; give another folder, or "
            "remove this one to replace it."
        )
    return last


def _ask_ordinary(model: nn.Module, tokenizer: Any, data: Data) -> list[dict[str, Any]]:
    if shards_of(model):
        print("ordinary requests were not asked: the model is sharded.")
        return []
    targets = [data.safe.target(qa) for qa in data.forget]
    try:
        return ordinary_answers(model, tokenizer, targets, progress=True)
    except Exception as error:  # not every model that trains can generate
        print(f"ordinary requests were not asked: {error}")
        return []
