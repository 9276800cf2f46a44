"""The whole way on a small model: memorise, estimate, unlearn, compare, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from nsru_kernels.checks import check_range
from nsru_kernels.environment import has_bf16_products
from nsru_kernels.files import read_json
from nsru_train.compare import Comparison, Contender, check_plan, compare
from nsru_train.config import DataConfig, LoraConfig, ModelConfig, SubspaceConfig, TrainConfig
from nsru_train.data.records import QA
from nsru_train.data.safe_targets import SafeTargets
from nsru_train.demo.sets import Sets, fictitious_sets, target_sets, tofu_sets
from nsru_train.demo.tiny_model import make_llama, memorise, train_tokenizer
from nsru_train.estimating import run_subspaces
from nsru_train.loading import MORE_SPLITS, Data, load_model
from nsru_train.methods import Method
from nsru_train.pipeline import check_training
from nsru_train.report import write_report
from nsru_train.report.summary import FORGET_TARGET, RETAIN_TARGET, SAFE_TARGET
from nsru_train.run_config import check_same_run
from nsru_train.run_folder import RunFolder
from nsru_train.sources import save_records

METHODS = ("nsru", "lora")
SEEN = ("forget", "retain")  # by the loss


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
    model: str | None,
    data_dir: str | None,
    seeds: int,
    lrs: Mapping[str, Sequence[float]],
    stop: float | None,
    probed: int | None,
    resume: bool,
    subspace: SubspaceConfig,
    lora: LoraConfig,
    objective: Method,
    train: TrainConfig,
    examples: int,
    max_seconds: float,
    command: str,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the comparison, write results.json and report.html into ``out``; see ``nsru demo -h``."""
    if unknown := sorted(lrs.keys() - set(METHODS)):
        raise ValueError(f"lrs: methods must be out of {', '.join(METHODS)}, got {unknown[0]!r}.")
    check_plan(lrs, seeds, examples, probed, stop)
    check_training(train)
    check_range("max_seconds", max_seconds, "must be positive")
    started = time.perf_counter()
    run = RunFolder(out).lock()
    run.write_environment()
    scale = FICTITIOUS if data_dir is None else TOFU
    safe = SafeTargets.from_file()
    if model is not None:
        sets = target_sets(model)
    elif data_dir is None:
        sets = fictitious_sets(scale.authors, safe)
    else:
        sets = tofu_sets(data_dir, scale.authors, safe)
    base_dir = model or str(run.path.resolve() / "base")
    config = _run_config(run, base_dir, sets, subspace, lora, objective, train)
    more = {name: records for name, records in sets.authors.items() if name not in SEEN}
    data = Data(sets.forget, sets.retain, {**more, **sets.general}, safe)
    digests = data.digests()
    config["demo"] = {"stop": stop, "probed": probed, "sets": digests}
    if resume:
        check_same_run(run.config_path, config)
    run.write_config(config)

    if model is not None:
        say(f"1/5  load {model}")
        base, tokenizer = load_model(ModelConfig(model))
    else:
        say(f"1/5  memorise {len(sets.memorised)} questions of {scale.authors} authors")
        base, tokenizer = base_model(Path(base_dir), sets.memorised, scale, max_seconds, progress)

    say("2/5  evaluate before, and estimate the retain subspaces")
    subspaces = run_subspaces(
        run, base, tokenizer, data.forget, [*data.kept, *data.more["retain_unseen"]], subspace,
        resume=resume, progress=progress,
    )  # fmt: skip
    print(subspaces.table())
    comparison = Comparison(
        run, base, tokenizer, data, subspaces, subspace, lora, train, scale.eval_steps, stop,
        probed, examples, resume, progress,
    )  # fmt: skip

    say(f"3/5  unlearn with {' and '.join(METHODS)}, {seeds} seeds each, {train.steps} steps")
    contenders = [Contender(name, objective, name == "nsru", "nsru") for name in METHODS]
    found = compare(comparison, contenders, lrs, seeds)
    say("4/5  compare with the goals")
    results: dict[str, Any] = {
        "schema": 1,
        "kind": "demo",
        "seconds": time.perf_counter() - started,
        "command": command,
        "setup": {
            **comparison.counts(),
            "sets": digests,
            "model_parameters": sum(p.numel() for p in base.parameters()),
            **({"scale": asdict(scale)} if model is None else {"model": model}),
            "lora": asdict(lora),
            "objective": asdict(objective),
            "train": asdict(train),
            "subspace": asdict(subspace),
            "stop": stop,
            "probed": probed,
            "lr": found.pop("lr"),
        },
        **found,
    }
    for name, bound, reached in goals(results["methods"]):
        print(f"  nsru {name} {bound}: {'reached' if reached else 'MISSED'}")
    run.write_results(results)
    say("5/5  report")
    write_report(run.path)
    return results


def goals(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, bool]]:
    """(quantity, bound, whether every NSRU run is within it) for what the demo sets out to show."""
    before, *after = (row for row in rows if row["method"] in ("before", "nsru"))
    kept = RETAIN_TARGET * before["retain_prob"]

    def every(name: str, holds: Callable[[float], bool]) -> bool:
        return bool(after) and all(holds(row[name]) for row in after)

    return [
        ("forget_prob", f"≤ {FORGET_TARGET}", every("forget_prob", lambda p: p <= FORGET_TARGET)),
        ("safe_prob", f"≥ {SAFE_TARGET}", every("safe_prob", lambda p: p >= SAFE_TARGET)),
        ("retain_prob", f"≥ {kept:.3f}", every("retain_prob", lambda p: p >= kept)),
    ]


def base_model(
    folder: Path, records: Sequence[QA], scale: Scale, max_seconds: float, progress: bool
) -> tuple[nn.Module, Any]:
    """A Llama that knows ``records`` by heart, from ``folder`` when it was made there before."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Emulated, a step in bf16 takes about ten times one in float32.
    scale = replace(scale, bf16=scale.bf16 and has_bf16_products())
    recipe = {"scale": asdict(scale), "records": [[qa.question, qa.answer] for qa in records]}
    recipe_file = folder / "recipe.json"
    if recipe_file.is_file() and read_json(recipe_file) == recipe:
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


def say(line: str) -> None:
    """A line that a reader of the log finds again."""
    print(f"\n{line}", flush=True)


def _run_config(
    run: RunFolder,
    base: str,
    sets: Sets,
    subspace: SubspaceConfig,
    lora: LoraConfig,
    objective: Method,
    train: TrainConfig,
) -> dict[str, Any]:
    """Write the data files; the config.yaml with which every other command works on the folder."""
    files = {}
    for name, records in {**sets.authors, **sets.general}.items():
        files[name] = str(run.path / "data" / f"{name}.jsonl")
        save_records(files[name], records)
    data = DataConfig(
        files["forget"],
        files["retain"],
        more={name: files[name] for name in MORE_SPLITS if name in files},
    )
    return {
        "model": asdict(ModelConfig(base)),
        "data": asdict(data),
        "subspace": asdict(replace(subspace, path=str(run.path.resolve() / "subspaces"))),
        "lora": asdict(lora),
        "objective": asdict(objective),
        "train": asdict(train),
    }
