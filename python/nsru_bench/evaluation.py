"""Questions a second of TOFU's full evaluation: ours against OpenUnlearning's own loop.

    python -m nsru_bench.evaluation --open-unlearning DIR --model runs/smollm2/target --data-dir DIR

One model in memory, the same first questions of every set, its eval/tofu configuration and our
`evaluate`, in turns. That both find the same is asserted before times are written. Seconds of the
process (all its threads) stand beside those of the clock, which other work on the machine makes
longer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from nsru_bench import rows
from nsru_kernels.dispatch import default_device
from nsru_train.data.records import QA
from nsru_train.evaluation import evaluate
from nsru_train.open_unlearning.checkout import register, use_checkout
from nsru_train.open_unlearning.settings import fit_to_machine, read_tofu_from
from nsru_train.sources import load_records

FORGET, HOLDOUT = "forget01", "holdout01"
SETS = {
    "forget": f"{FORGET}_perturbed",
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
    "holdout": HOLDOUT,
}
NEW_TOKENS = 200
# Largest difference of an aggregate: theirs rounds each loss to float32, and ROUGE sees texts that
# a near-tie of two tokens may change.
CLOSE = {"forget_Q_A_Prob": 1e-4, "forget_truth_ratio": 1e-4, "model_utility": 0.02}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--open-unlearning", required=True, help="checkout of the repository")
    parser.add_argument("--model", required=True, help="model folder with a chat template")
    parser.add_argument("--data-dir", required=True, help="folder with TOFU's files")
    parser.add_argument("--questions", type=int, default=10, help="of each of the five sets")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=rows.RESULTS / "evaluation_cpu.csv")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder)
        for name in SETS.values():
            lines = Path(args.data_dir, f"{name}.json").read_text().splitlines(True)
            (few / f"{name}.json").write_text("".join(lines[: args.questions]))
        config = their_config(use_checkout(args.open_unlearning), args.model, few)
        register()
        measure(config, few, args)


def their_config(repo: Path, model: str, data: Path) -> Any:
    from hydra import compose, initialize_config_dir

    overrides = [
        "experiment=eval/tofu/default", "task_name=speed", f"forget_split={FORGET}",
        f"holdout_split={HOLDOUT}", f"paths.output_dir={data / 'out'}",
        "model.template_args.system_prompt=null", "model.template_args.date_string=null",
        "~model.model_args.device_map", "model.model_args.torch_dtype=float32",
        "model.model_args.attn_implementation=sdpa",
        *(f"model.{part}.pretrained_model_name_or_path={model}"
          for part in ("model_args", "tokenizer_args")),
    ]  # fmt: skip
    with initialize_config_dir(str(repo / "configs"), version_base=None):
        config = compose("eval.yaml", overrides)
    config.paths.work_dir = str(data)  # else it asks for a run of Hydra
    fit_to_machine(config, overrides)
    read_tofu_from(config, data)
    return config


def make_formats_equal(tokenizer: Any) -> None:
    """Let a chat end with its last turn's EOS, and pad with a token that no chat holds.

    Theirs would score a line break and a second EOS, and not attend to what equals the pad token.
    """
    template = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% set chat %}" + template + "{% endset %}"
        "{{ chat if add_generation_prompt else chat.rstrip() }}"
    )  # fmt: skip
    unused = (token for token in tokenizer.all_special_tokens if token not in template)
    tokenizer.pad_token = next(unused)


def measure(config: Any, data: Path, args: argparse.Namespace) -> None:
    from evals import get_evaluators
    from model import get_model

    model, tokenizer = get_model(config.model)
    model.to(default_device()).eval()
    make_formats_equal(tokenizer)
    [evaluator] = get_evaluators(config.eval).values()
    # What theirs does not ask: the questions in other words, and answers to the holdout set.
    splits: dict[str, list[QA]] = {
        split: [
            dataclasses.replace(qa, paraphrased_question=None)
            for qa in load_records(f"tofu:{name}", data, ignore_unknown=True)
        ]
        for split, name in SETS.items()
    }
    answered = splits.keys() - {"holdout"}

    def theirs() -> dict[str, float]:
        return evaluator.evaluate(
            model=model, tokenizer=tokenizer, template_args=config.model.template_args,
            output_dir=str(data / "out"), overwrite=True,
        )  # fmt: skip

    def ours() -> dict[str, float]:
        found = evaluate(
            model, tokenizer, splits,
            max_new_tokens=NEW_TOKENS, generate=answered, progress=False,
        )  # fmt: skip
        return {
            "forget_Q_A_Prob": found.metrics["forget"]["probability"],
            "forget_truth_ratio": found.metrics["forget"]["truth_ratio"],
            "model_utility": found.overall["model_utility"],
            "privleak": found.overall["privleak"],
        }

    calls: dict[str, Callable[[], dict[str, float]]] = {"open-unlearning": theirs, "nsru": ours}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    found: dict[str, dict[str, float]] = {}
    for _ in range(args.rounds):
        for name, call in calls.items():
            clock, process = time.perf_counter(), time.process_time()
            found[name] = call()
            times[name].append((time.perf_counter() - clock, time.process_time() - process))
            print(name, *(f"{seconds:.1f} s" for seconds in times[name][-1]), flush=True)
    print(json.dumps(found, indent=1))
    for metric, close in CLOSE.items():
        gap = abs(found["nsru"][metric] - found["open-unlearning"][metric])
        assert gap <= close, f"{metric} differs by {gap:.2g}: {found}"
    questions = sum(map(len, splits.values()))
    base = [median(column) for column in zip(*times["open-unlearning"], strict=True)]
    table = []
    for name in calls:
        clock, process = (median(column) for column in zip(*times[name], strict=True))
        table.append(
            {
                "op": "evaluation", "provider": name, "model": Path(args.model).name,
                "questions": questions, "seconds": round(clock, 2),
                "process_seconds": round(process, 2),
                "questions_per_s": round(questions / clock, 4),
                "ratio": round(base[0] / clock, 3), "process_ratio": round(base[1] / process, 3),
                "rounds": args.rounds, "load": round(os.getloadavg()[0], 1),
                **rows.run_columns("transformers", device=next(model.parameters()).device),
            }
        )  # fmt: skip
        print({k: table[-1][k] for k in ("provider", "seconds", "questions_per_s", "ratio",
                                         "process_ratio", "load")})  # fmt: skip
    rows.replace(args.out, table)


if __name__ == "__main__":
    main()
