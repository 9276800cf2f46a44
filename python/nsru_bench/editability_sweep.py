"""How much room to leave: unlearning at several editability floors, and without projection.

    python -m nsru_bench.editability_sweep --out benchmarks/results/editability/fictitious.csv

Uses the demo's model and questions (made in runs/sweep when absent). One row a floor and seed: what
is left of the forgotten answers, and what each group of retain answers lost, the least among the
evaluated steps with forget_prob ≤ LEVEL.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from nsru_bench import rows
from nsru_train.config import LoraConfig, Objective, SubspaceConfig, TrainConfig
from nsru_train.data.safe_targets import SafeTargets
from nsru_train.demo.run import FICTITIOUS, TOFU, base_model
from nsru_train.demo.sets import fictitious_sets, tofu_sets
from nsru_train.evaluate import probability_sets
from nsru_train.pipeline import Data, find_subspaces, unlearn
from nsru_train.scoring import quick_probabilities

FLOORS = (0.02, 0.05, 0.1, 0.2, 0.4)
LEVEL = 0.1
GROUPS = ("retain_prob", "retain_unseen_prob", "retain_untouched_prob")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", help="folder with TOFU's files; none makes authors")
    parser.add_argument("--base", type=Path, default=Path("runs/sweep/base"), help="model folder")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    args = parser.parse_args()
    safe = SafeTargets.from_file()
    if args.data_dir is None:
        scale, sets = FICTITIOUS, fictitious_sets(FICTITIOUS.authors, safe)
    else:
        scale, sets = TOFU, tofu_sets(args.data_dir, TOFU.authors, safe)
    model, tokenizer = base_model(args.base, sets.memorised, scale, 3600, False)
    probed = probability_sets(tokenizer, sets.authors, safe)
    before = quick_probabilities(model, tokenizer, probed)
    data = Data(sets.forget, sets.retain, {}, safe)
    made = []
    for floor in (None, *FLOORS):
        subspaces = None
        if floor is not None:
            subspaces = find_subspaces(
                model, tokenizer, sets.forget, [*sets.retain, *sets.retain_unseen],
                SubspaceConfig(min_editability=floor), progress=False,
            )  # fmt: skip
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                outcome = unlearn(
                    copy.deepcopy(model), tokenizer, data, folder,
                    targets="all-linear", subspaces=subspaces,
                    lora=LoraConfig(project=floor is not None), objective=Objective(),
                    train=replace(TrainConfig(), seed=seed, save_steps=0),
                    on_eval=lambda _, m: quick_probabilities(m, tokenizer, probed),
                    eval_steps=scale.eval_steps, progress=False,
                )  # fmt: skip
            row = {
                "method": "lora" if floor is None else "nsru",
                "min_editability": floor,
                "mean_rank": _mean(subspaces, "rank"),
                "mean_captured_energy": _mean(subspaces, "captured_energy"),
                "seed": seed,
                **_summary(outcome.evaluations, before),
            }
            print(row, flush=True)
            made.append({**row, **rows.run_columns("transformers")})
    rows.replace(args.out, made)


def _mean(subspaces: Any, name: str) -> float | None:
    if subspaces is None:
        return None
    return statistics.fmean(getattr(entry, name) for entry in subspaces.inputs)


def _summary(points: list[dict[str, float]], before: Any) -> dict[str, float | None]:
    reached = [point for point in points if point["forget_prob"] <= LEVEL]
    losses = {
        f"{group.removesuffix('_prob')}_lost": min(
            (before[group] - point[group] for point in reached), default=None
        )
        for group in GROUPS
    }
    last = {f"last_{name}": points[-1][name] for name in ("forget_prob", "safe_prob", *GROUPS)}
    return {**losses, **last}


if __name__ == "__main__":
    main()
