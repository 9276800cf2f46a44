"""Both methods from one base model: at several rates and seeds, resumed, and judged alike."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

import nsru_kernels as nk
from nsru_kernels.files import check_fields
from nsru_kernels.hf.peft_format import load_lora_adapter
from nsru_kernels.subspaces.collection import SubspaceSet
from nsru_train.config import LoraConfig, TrainConfig
from nsru_train.data.safe_targets import SafeTargets
from nsru_train.demo.sets import Sets
from nsru_train.evaluate import evaluate, probability_sets
from nsru_train.methods import Method
from nsru_train.pipeline import Data, unlearn
from nsru_train.report.summary import FORGET_TARGET
from nsru_train.run_folder import RunFolder
from nsru_train.scoring import greedy_answers, quick_probabilities

QUALITY = (
    "rougeL_recall",
    "truth_ratio",
    "extraction_strength",
    "exact_memorisation",
    "safe_rougeL_recall",
)
KNOWLEDGE = ("option_probability", "exact_memorisation")
# What the comparison reads of each point of a frontier.
_POINT = {
    **dict.fromkeys(("lr", "forget_prob", "safe_prob", "retain_unseen_prob"), float),
    "method": str,
    "step": int,
}


@dataclass
class Comparison:
    """Runs of both methods from one base model, each kept in a folder of its own."""

    run: RunFolder
    base: nn.Module
    tokenizer: Any
    sets: Sets
    safe: SafeTargets
    targets: str | Sequence[str]
    exclude: str | Sequence[str]
    subspaces: SubspaceSet
    lora: LoraConfig
    objective: Method
    train: TrainConfig
    eval_steps: int
    stop: float | None
    probed: int | None
    examples: int
    resume: bool
    progress: bool

    def __post_init__(self) -> None:
        self._started = time.time()
        self._probed = probability_sets(
            self.tokenizer, self.sets.authors, self.safe, limit=self.probed
        )
        self._shown = [
            *self.sets.forget[: self.examples],
            *self.sets.retain_unseen[: self.examples // 2],
        ]
        self._start: dict[str, float] = {}

    def probe(self, model: nn.Module) -> dict[str, float]:
        """Mean answer probabilities on the demo's sets: a point of the frontier."""
        return quick_probabilities(model, self.tokenizer, self._probed)

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
        """Whether a point of the frontier has forgotten, and says the safe answer instead."""
        if self.stop is None:
            return point["forget_prob"] <= FORGET_TARGET
        return point["forget_prob"] <= self.stop and point["safe_prob"] >= 1 - self.stop

    def unlearn(self, method: str, lr: float, seed: int) -> dict[str, Any]:
        """Train one adapter, or take the one trained before: its frontier, leakage and times."""
        folder = RunFolder(self.run.path / "runs" / f"{method}-{lr:g}-{seed}")
        if not self._done(folder):
            adapted = copy.deepcopy(self.base)
            outcome = unlearn(
                adapted,
                self.tokenizer,
                Data(self.sets.forget, self.sets.retain, {}, self.safe),
                folder.path,
                targets=self.targets,
                exclude=self.exclude,
                subspaces=self.subspaces,
                lora=replace(self.lora, project=method == "nsru"),
                objective=self.objective,
                train=replace(self.train, lr=lr, seed=seed, save_steps=0),
                # Before the first step an adapter is zero.
                on_eval=lambda step, model: self.probe(model) if step else self._start,
                eval_steps=self.eval_steps,
                stop_at=self.is_enough if self.stop is not None else None,
                progress=self.progress,
            )
            label = {"method": method, "lr": lr, "seed": seed}
            metadata = {"fingerprint": self.subspaces.fingerprint}
            nk.save_lora_adapter(adapted, folder.adapter_dir, metadata=metadata)
            folder.write_results(
                {
                    **label,
                    "frontier": [{**label, **point} for point in outcome.evaluations],
                    "leakage": outcome.leakage,
                    "outcome": outcome.results(),
                }
            )
        kept = folder.read_results(frontier=list[dict], leakage=list[dict], outcome=dict)
        for point in kept["frontier"]:
            check_fields(folder.results_path, point, _POINT)
        return {**kept, "folder": str(folder.path)}

    def judge(self, trained: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the results: the last point of the frontier, and how the adapter answers."""
        folder = RunFolder(Path(trained["folder"], "judged"))
        if not self._done(folder):
            adapted = copy.deepcopy(self.base)
            load_lora_adapter(adapted, Path(trained["folder"], "adapter"))
            row = {**trained["frontier"][-1], **self._quality(adapted), **trained["outcome"]}
            folder.write_results({"row": row, "answers": self._say(adapted)})
        return folder.read_results(row=dict)["row"]

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
                "split": "forget" if qa in self.sets.forget else "retain_unseen",
                "question": qa.question,
                "original": qa.answer,
                "safe_target": self.safe.target(qa) if qa in self.sets.forget else None,
                **{name: texts[i] for name, texts in answers.items()},
            }
            for i, qa in enumerate(self._shown)
        ]

    def _done(self, folder: RunFolder) -> bool:
        """Whether this command made the folder's results, or an earlier one that goes on."""
        path = folder.results_path
        return path.exists() and (self.resume or path.stat().st_mtime >= self._started)

    def _say(self, model: nn.Module) -> list[str]:
        questions = [qa.question for qa in self._shown]
        return greedy_answers(model, self.tokenizer, questions, max_new_tokens=80)

    def _quality(self, model: nn.Module) -> dict[str, Any]:
        # Model utility needs wrong answers to compare with; TOFU has them for its first 400 rows.
        splits = {
            "forget": self.sets.forget,
            "retain": [qa for qa in self.sets.retain if qa.perturbed_answers],
            "holdout": self.sets.holdout,
        }
        splits = {name: records for name, records in splits.items() if records}
        found = evaluate(model, self.tokenizer, splits, safe=self.safe, progress=self.progress)
        row = {**found.overall, "model_utility_splits": list(found.utility_splits)}
        for split in ("forget", "retain"):
            metrics = found.metrics.get(split, {})
            row |= {f"{split}_{name}": metrics[name] for name in QUALITY if name in metrics}
        if self.sets.general:
            known = evaluate(
                model, self.tokenizer, self.sets.general, generate=False, progress=self.progress
            )
            for split, metrics in known.metrics.items():
                row |= {f"{split}_{name}": metrics[name] for name in KNOWLEDGE if name in metrics}
        return row


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
