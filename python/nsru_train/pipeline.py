"""The way from a model and its retain subspaces to a trained adapter, step by step."""

from __future__ import annotations

import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import nsru_kernels as nk
from nsru_kernels.hf.peft_format import copy_lora_adapter
from nsru_kernels.nn.swap import match_linears, take_all
from nsru_kernels.subspaces.estimate import SubspaceSet
from nsru_train.config import LoraConfig, SubspaceConfig, TrainConfig
from nsru_train.data.encode import encode_qa
from nsru_train.estimating import token_batches
from nsru_train.guard import EcoGuard
from nsru_train.language_models import refuse_encoder_decoder
from nsru_train.loading import Data
from nsru_train.measure import PeakMemory
from nsru_train.methods import Method, Objective
from nsru_train.run_folder import RunFolder
from nsru_train.scoring import quick_probabilities
from nsru_train.updates import scale_updates

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def check_layers(
    model: nn.Module, subspace: SubspaceConfig, lora: LoraConfig, methods: Sequence[Method]
) -> None:
    """Raise ValueError, before anything takes time, where a name fits no layer of the model, or a
    method finds none of its own."""
    for method in methods:
        method.targets(model)
    names = [name for name, _ in match_linears(model, subspace.targets, subspace.exclude)]
    take_all("lora.rank_pattern", lora.rank_pattern, names, lora.rank)
    take_all("lora.alpha_pattern", lora.alpha_pattern, names, lora.alpha)


def check_training(train: TrainConfig) -> None:
    """Raise ValueError where transformers cannot report as asked, or accelerate would shard so."""
    from accelerate import DeepSpeedPlugin
    from transformers import get_scheduler
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    from nsru_train.trainer import refuse_zero_3

    names, available = train.report_to, [*get_available_reporting_integrations(), "all", "none"]
    if missing := sorted(set(names) - set(available)):
        remedy = f": pip install {missing[0]}" if missing[0] in INTEGRATION_TO_CALLBACK else ""
        raise ValueError(
            f"train.report_to: {missing[0]!r} is unknown or its package is not installed{remedy}; "
            f"available: {', '.join(available)}."
        )
    if len(names) > 1 and (alone := sorted({"all", "none"} & set(names))):
        raise ValueError(
            f"train.report_to: {alone[0]!r} goes with no other name, got {', '.join(names)}; give "
            "it alone, or leave it out."
        )
    kwargs = train.lr_scheduler_kwargs
    try:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        get_scheduler(train.lr_scheduler_type, optimizer, 1, 2, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"train.lr_scheduler_kwargs: {train.lr_scheduler_type} does not take {kwargs}: {error}"
        ) from error
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # set by accelerate launch
        refuse_zero_3(DeepSpeedPlugin())


def add_adapters(
    model: nn.Module,
    targets: str | Sequence[str],
    lora: LoraConfig,
    *,
    exclude: str | Sequence[str] = (),
    subspaces: Mapping[str, Any] | None,
    batch: Mapping[str, torch.Tensor],
) -> nk.SwapReport:
    """`swap_linears` as the settings say; ``batch`` shows which linears read the same input."""
    noisy = [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    if noisy:
        logger.warning(
            "The model's own %d dropout layers (p up to %g) act in training, but not in the base "
            "model as its reference. Set the dropouts in its config to 0 for a loss without noise.",
            len(noisy), max(noisy),
        )  # fmt: skip
    swap = nk.swap_linears(
        model,
        targets,
        rank=lora.rank,
        alpha=lora.alpha,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        exclude=exclude,
        dropout=lora.dropout,
        subspaces=subspaces if lora.project else None,
        batch=batch,
    )
    if lora.project and isinstance(subspaces, SubspaceSet):
        factors = subspaces.alphas(1.0)
        for name, module in _adapted(model):
            module.alpha *= factors[name]
    return swap


def kept_point(points: Sequence[Mapping[str, Any]], kept_step: int | None) -> Mapping[str, Any]:
    """The evaluation of the adapters that were kept, the last where a method keeps no best."""
    return next((point for point in points if point["step"] == kept_step), points[-1])


@dataclass
class Outcome:
    """Results of ``unlearn`` beside the changed model.

    Attributes:
        swap: which layers got adapters, which did not and why.
        evaluations: of on_eval, each with its step.
        step_seconds: median time of an optimizer step.
        peak_bytes: most memory in use while training: of the GPU, or of the process on a CPU.
        seconds: of all.
        early_stop: why training stopped before its last step; None where it did not.
        kept_step: the step whose adapters were kept, of a method that keeps the best.
        leakage: for each module ‖Ā U‖_F / ‖A‖_F and what rounding alone can cause.
    """

    swap: nk.SwapReport
    evaluations: list[dict[str, float]]
    step_seconds: float
    peak_bytes: int
    seconds: float
    early_stop: str | None
    kept_step: int | None
    leakage: list[dict[str, Any]]

    def results(self) -> dict[str, Any]:
        """As entries of results.json."""
        ranks = self.swap.retain_ranks.values()
        return {
            "mean_retain_rank": statistics.fmean(ranks),
            "step_seconds": self.step_seconds,
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
            "stopped_early": self.early_stop,
            **({} if self.kept_step is None else {"kept_step": self.kept_step}),
        }

    def __str__(self) -> str:
        return str(self.swap)


@dataclass
class Guarded:
    """Results of ``unlearn`` by a method that trains nothing: the model is guarded.

    Attributes:
        guard: attached to the model.
        evaluations: of on_eval, each with its step.
        flagged: share of each set's questions that the guard acts on, 0 to 1.
        kept_step: the try of the guard's strength that was kept.
        peak_bytes: most memory in use: of the GPU, or of the process on a CPU.
        seconds: of all.
        leakage: none, for there are no adapters.
    """

    guard: EcoGuard
    evaluations: list[dict[str, float]]
    flagged: dict[str, float]
    kept_step: int
    peak_bytes: int
    seconds: float
    leakage: tuple[()] = ()

    def results(self) -> dict[str, Any]:
        """As entries of results.json: SPLIT_flagged are shares of a set's questions."""
        held_out = self.guard.classifier.held_out
        return {
            **({"sigma": self.guard.sigma} if self.guard.corruption == "rand_noise" else {}),
            "threshold": self.guard.classifier.threshold,
            "held_out_missed": held_out["missed"] / held_out["forget"],
            "held_out_flagged": held_out["flagged"] / held_out["retain"],
            **self.flagged,
            "kept_step": self.kept_step,
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        counts = self.guard.classifier.held_out
        shares = ", ".join(f"{share:.1%} of {name}" for name, share in self.flagged.items())
        return (
            f"held-out questions: {counts['missed']} of {counts['forget']} to forget missed, "
            f"{counts['flagged']} of {counts['retain']} to keep flagged\nflagged in all: "
            f"{shares.replace('_flagged', '')}"
        )


def unlearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    folder: str | Path,
    *,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    subspaces: Mapping[str, Any] | None = None,
    lora: LoraConfig | None = None,
    objective: Method | None = None,
    train: TrainConfig | None = None,
    max_length: int = 512,
    resume: bool = False,
    on_eval: Callable[[int, nn.Module], Mapping[str, float]] | None = None,
    eval_steps: int = 10,
    stop_at: Callable[[Mapping[str, float]], bool] | None = None,
    adapter: str | Path | None = None,
    progress: bool = True,
) -> Outcome | Guarded:
    """Swap the model's linears and train; checkpoints and metrics.jsonl go to ``folder``.

    Where the method trains nothing, its guard is attached to the model instead, and lora and train
    have no effect but for the seed.

    Args:
        model: the base model, changed in place; keep the result with `save_adapter`.
        tokenizer: of the model.
        data: what to forget, what to retain, and the safe targets.
        folder: of checkpoints and metrics.jsonl.
        targets: linears that get adapters, as for `nsru_kernels.swap_linears`; None takes those
            that have a subspace, all linear layers without subspaces.
        exclude: targets to leave alone, named like them.
        subspaces: from `find_subspaces`; none for plain LoRA.
        lora: rank, alpha and dropout of the adapters, and whether they are projected; None takes
            the defaults of `LoraConfig`.
        objective: the method with its settings; None is `Objective()`.
        train: steps, learning rate, batch size, …; None takes the defaults of `TrainConfig`.
        max_length: most tokens of a question with its answer.
        resume: go on from the last checkpoint in ``folder``, with the settings that it was made by.
        on_eval: hook(step, model) -> dict of floats, called before the first step, every eval_steps
            and at the end.
        eval_steps: of on_eval.
        stop_at: says of on_eval's results whether to stop there; None trains all steps.
        adapter: folder of an adapter that the same settings made, to start from.
        progress: show progress bars.

    Returns:
        What was done and how long it took; `Guarded` for a method that trains nothing.

    Raises:
        TypeError: objective, lora or train is something else, as a method's class.
        ValueError: a text is too long, lora.project has no subspaces, they are of other layers or
            of another model, the model has adapters already, or folder another run's checkpoints.
    """
    lora, objective, train = lora or LoraConfig(), objective or Objective(), train or TrainConfig()
    for name, value, kind in (
        ("objective", objective, Method),
        ("lora", lora, LoraConfig),
        ("train", train, TrainConfig),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"unlearn: {name} must be a {kind.__name__}, got {value!r:.60}.")
    if not objective.trains:
        return _attach_guard(
            model, tokenizer, data, RunFolder(folder),
            objective=objective, seed=train.seed, max_length=max_length, on_eval=on_eval,
            progress=progress,
        )  # fmt: skip
    from transformers import TrainingArguments, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    from nsru_train.trainer import NSRUTrainer, prepare_dataset

    if lora.project and subspaces is None:
        raise ValueError(
            "unlearn: subspaces must be given where lora.project is on; find_subspaces makes them, "
            "and LoraConfig(project=False) is plain LoRA."
        )
    if not resume and Path(folder).is_dir() and (last := get_last_checkpoint(str(folder))):
        raise ValueError(
            f"unlearn: {folder} holds checkpoints of an earlier run; resume=True goes on from "
            f"{Path(last).name}, or give another folder."
        )
    if targets is None:
        targets = "all-linear" if subspaces is None else list(subspaces)
    started = time.perf_counter()
    set_seed(train.seed)
    [first] = token_batches(
        model, tokenizer, data.forget[:1], max_tokens=max_length, max_length=max_length
    )
    swap = add_adapters(
        model, objective.targets(model) or targets, lora,
        exclude=exclude, subspaces=subspaces, batch=first,
    )  # fmt: skip
    swap = objective.adapt(model, swap, tokenizer, data.forget, data.kept)
    if objective.starts_elsewhere:
        refuse_encoder_decoder(model, "adapters that do not start at zero")
        if train.weight_decay:
            raise ValueError(
                "train.weight_decay must be 0 for adapters that do not start at zero, got "
                f"{train.weight_decay}: it would undo a part of their start."
            )
        twos = (
            [
                token_batches(
                    model, tokenizer, records[i : i + 2],
                    max_tokens=2 * max_length, max_length=max_length,
                )[0]
                for i in range(0, len(records), 2)
            ]
            for records in (data.forget, data.kept)
        )  # fmt: skip
        objective.begin(model, *twos)
    if adapter is not None:
        copy_lora_adapter(model, adapter)
        scale_updates(model, 1 / objective.applied)
    dataset = prepare_dataset(
        model,
        tokenizer,
        data.forget,
        data.kept,
        objective,
        safe=data.safe,
        retain_per_forget=train.retain_per_forget,
        seed=train.seed,
        max_length=max_length,
    )
    _warn_of_uneven(len(dataset), train.batch_size)
    os.environ.setdefault("WANDB_DIR", str(Path(folder).resolve()))  # else the working directory
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    device = next(model.parameters()).device
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=train.steps,
        learning_rate=train.lr,
        warmup_steps=round(train.warmup * train.steps),
        per_device_train_batch_size=min(train.batch_size, len(dataset)),
        gradient_accumulation_steps=train.accumulate,
        weight_decay=train.weight_decay,
        lr_scheduler_type=train.lr_scheduler_type,
        lr_scheduler_kwargs=train.lr_scheduler_kwargs,
        logging_steps=1,
        save_strategy="steps" if train.save_steps else "no",
        save_steps=train.save_steps or train.steps,
        save_total_limit=2,
        dataloader_pin_memory=False,
        use_cpu=device.type == "cpu",
        disable_tqdm=not progress,
        report_to=train.report_to,
        bf16=train.bf16,
        seed=train.seed,
    )
    trainer = NSRUTrainer(
        model,
        arguments,
        dataset,
        objective,
        tokenizer,
        retain_stop_ratio=train.retain_stop_ratio,
        on_eval=on_eval,
        eval_steps=eval_steps,
        stop_at=stop_at,
    )
    precision = trainer.accelerator.mixed_precision
    if precision != ("bf16" if train.bf16 else "no"):  # as accelerate launch sets it
        logger.warning(
            "train.bf16 is %s, and accelerate trains in %s (ACCELERATE_MIXED_PRECISION).",
            *(str(train.bf16).lower(), precision),
        )
    trainer.settings = {"mixed precision": precision, **_binding(objective, lora, train)}
    with PeakMemory(device) as peak:
        trainer.train(resume_from_checkpoint=resume or None)
    seconds = [row["seconds"] for row in RunFolder(folder).read_metrics() if "seconds" in row]
    model.eval()
    if trainer.kept_step == 0:
        logger.warning(
            "Step 0 is kept, the model as it was: every later one that was looked at cost retain "
            "answers more than the method allows. Lower train.lr, or look sooner: train.eval_steps."
        )
    elif not any(module.lora_B.any() for _, module in _adapted(model)):
        logger.warning(
            "The adapters are zero as before: the learning rate was 0 in all %d steps. Raise "
            "train.lr, or lower train.warmup.",
            trainer.state.global_step,
        )
    return Outcome(
        swap=swap,
        evaluations=trainer.evaluations,
        step_seconds=statistics.median(seconds) if seconds else 0.0,
        peak_bytes=peak.bytes,
        seconds=time.perf_counter() - started,
        early_stop=trainer.early_stop_reason,
        kept_step=trainer.kept_step,
        leakage=[
            {"module": name, "leakage": module.leakage(), "rounding": rounding(module.dtype)}
            for name, module in _adapted(model)
        ],
    )


def _warn_of_uneven(count: int, batch_size: int) -> None:
    """Say where accelerate fills the last batch of several processes from an epoch's beginning."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and count % (batch_size * world):
        logger.warning(
            "train.batch_size: %d questions to forget do not fill batches of %d on %d processes, "
            "so that some are used twice in an epoch; choose a size that they fill.",
            count, batch_size, world,
        )  # fmt: skip


def _binding(objective: Method, lora: LoraConfig, train: TrainConfig) -> dict[str, str]:
    """The settings that a resumed run must have as it began, by name."""
    free = {"report_to", "eval_steps", "save_steps"}
    if train.lr_scheduler_type == "constant":  # further steps are as those before
        free.add("steps")
    return {"method": type(objective).__name__} | {
        f"{section}.{field.name}": json.dumps(_plain(getattr(settings, field.name)), sort_keys=True)
        for section, settings in (("objective", objective), ("lora", lora), ("train", train))
        for field in fields(settings)
        if field.name not in free
    }


def _plain(value: Any) -> Any:
    """A setting as JSON holds it: numbers by their value, objects by their type."""
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [_plain(own) for own in value]
        return sorted(parts, key=str) if isinstance(value, (set, frozenset)) else parts
    return type(value).__name__


def _attach_guard(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    run: RunFolder,
    *,
    objective: Method,
    seed: int,
    max_length: int,
    on_eval: Callable[[int, nn.Module], Mapping[str, float]] | None,
    progress: bool,
) -> Guarded:
    from tqdm.auto import tqdm

    refuse_encoder_decoder(model, "a guard of prompts")
    started = time.perf_counter()
    answers = [encode_qa(tokenizer, qa.question, qa.answer, max_length=max_length)
               for qa in data.forget]  # fmt: skip
    run.drop_metrics_after(0)
    evaluations = [] if on_eval is None else [{"step": 0, **on_eval(0, model)}]
    tried: list[tuple[float, int]] = []
    bar = tqdm(desc="strength", unit="step", disable=not progress, leave=False)

    def note(step: int, forget_prob: float, **values: float) -> None:
        tried.append((forget_prob, step))
        run.log_metrics({"step": step, "forget_prob": forget_prob, **values})
        bar.set_postfix(forget_prob=forget_prob, **values)
        bar.update()
        if on_eval is not None:
            evaluations.append({"step": step, **on_eval(step, model)})

    with PeakMemory(next(model.parameters()).device) as peak, bar:
        attached = objective.make_guard(
            model,
            tokenizer,
            *([qa.question for qa in records] for records in (data.forget, data.kept)),
            seed=seed,
            measure=lambda: quick_probabilities(model, tokenizer, answers),
            note=note,
        )
    flags = {
        f"{name}_flagged": attached.flags([qa.question for qa in records])
        for name, records in data.splits().items()
    }
    return Guarded(
        guard=attached.guard,
        evaluations=evaluations,
        flagged={name: statistics.fmean(found) for name, found in flags.items()},
        kept_step=min(tried)[1],
        peak_bytes=peak.bytes,
        seconds=time.perf_counter() - started,
    )


def _adapted(model: nn.Module) -> list[tuple[str, nk.NSRULinear]]:
    return [(n, module) for n, module in model.named_modules() if isinstance(module, nk.NSRULinear)]


def rounding(dtype: torch.dtype) -> float:
    """Leakage that rounding the projected adapter to the weight's dtype can cause at most."""
    return torch.finfo(dtype).eps / 2
