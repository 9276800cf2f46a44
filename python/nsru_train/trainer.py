"""The trainer of adapters: a method's loss, its rows, its evaluations."""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import DeepSpeedPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)

import nsru_kernels as nk
from nsru_kernels.nn.inputs import ActivationStream, evaluating
from nsru_kernels.nn.sharded import whole
from nsru_train.callbacks import (
    EarlyStopCallback,
    EvalHookCallback,
    GradientCheckCallback,
    LossProgressCallback,
    MetricsCallback,
    evaluations,
)
from nsru_train.config import TrainConfig
from nsru_train.data.encode import Encoded, encode_qa, pad_token_id
from nsru_train.data.records import QA
from nsru_train.data.safe_targets import SafeTargets
from nsru_train.language_models import check_sequences, is_encoder_decoder
from nsru_train.losses.batch import SAFE, ScoredBatch
from nsru_train.methods import Method, Objective, check_records
from nsru_train.resumable import CheckpointError, ResumableTrainer
from nsru_train.run_folder import RunFolder
from nsru_train.scoring import score_sequences
from nsru_train.unlearn_dataset import (
    RowCollator,
    StepBatches,
    UnlearnDataset,
    make_train_dataset,
    taught,
)
from nsru_train.updates import BestAdapters, scale_updates, scaled_updates, trainable

__all__ = [
    "CheckpointError",
    "NSRUTrainer",
    "UnlearnDataset",
    "make_train_dataset",
    "prepare_dataset",
    "reference_nll",
]

logger = logging.getLogger(__name__)

BEST_FILE = "best.safetensors"


def reference_nll(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[QA],
    *,
    max_tokens: int = 4096,
    max_length: int = 512,
) -> list[float]:
    """NLL of each forget answer with the adapters off, which makes a second model unnecessary.

    Args:
        model: with or without adapters.
        tokenizer: of the model.
        forget: questions with their undesired answers.
        max_tokens: of one batch, padding included.
        max_length: most tokens of one sequence.

    Returns:
        One float for each question: nats, summed over the answer's tokens and EOS.
    """
    encoded = [encode_qa(tokenizer, qa.question, qa.answer, max_length=max_length) for qa in forget]
    return encoded_nll(model, tokenizer, encoded, max_tokens=max_tokens)


def encoded_nll(
    model: nn.Module, tokenizer, encoded: Sequence[Encoded], *, max_tokens: int = 4096
) -> list[float]:
    """`reference_nll` of what is encoded already."""
    with nk.adapters_disabled(model):
        scores = score_sequences(model, tokenizer, encoded, max_tokens=max_tokens)
    return [float(score.nll.sum()) for score in scores]


def prepare_dataset(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[QA],
    retain: Sequence[QA],
    method: Method | None = None,
    *,
    safe: SafeTargets | None = None,
    retain_per_forget: int = TrainConfig.retain_per_forget,
    seed: int = 0,
    max_length: int = 512,
) -> UnlearnDataset:
    """The dataset of `NSRUTrainer`, encoded, with what the method's loss reads of the base model.

    Args:
        model: with or without adapters; one forward of each answer to forget, adapters off.
        tokenizer: of the model.
        forget: questions with the answers to forget.
        retain: questions with the answers to keep.
        method: says which rows an item holds; None is `Objective`.
        safe: gives each forget question the answer wanted instead; None takes the built-in ones.
        retain_per_forget: retain questions for each forget question in a batch.
        seed: of the orders. The safe target of a question is the same for every seed.
        max_length: most tokens of a question with its answer.

    Returns:
        One item for each forget question.

    Raises:
        ValueError: an empty set, or a text longer than max_length.
    """
    method, safe = method or Objective(), safe or SafeTargets()
    check_records([method], forget, retain)
    texts = [taught(qa, safe, method.alternatives) for qa in forget]
    ref_safe = None
    if SAFE in method.ref_nll:
        pairs = [QA(qa.question, t) for qa, some in zip(forget, texts, strict=True) for t in some]
        found = iter(reference_nll(model, tokenizer, pairs, max_length=max_length))
        ref_safe = [[next(found) for _ in some] for some in texts]
    return make_train_dataset(
        tokenizer,
        forget,
        retain,
        safe,
        reference_nll(model, tokenizer, forget, max_length=max_length),
        ref_safe=ref_safe,
        kinds=method.rows,
        alternatives=method.alternatives,
        retain_per_forget=retain_per_forget,
        seed=seed,
        max_length=max_length,
        domains=method.domains(forget),
    )


def unlearning_loss(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    method: Method,
    state: Mapping[str, float] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The method's loss and its parts, detached, from one forward of all rows together.

    Further forwards, without gradient, are those that the method asks for.

    Args:
        batch: as `RowCollator` makes it.
        state: of the method, as its `after_step` gives it; None is its `start`.
    """
    state = method.start() if state is None else state
    parts = method.loss(ScoredBatch(model, batch, method.by_logits, state))
    return parts["total"], {name: value.detach() for name, value in parts.items()}


class NSRUTrainer(ResumableTrainer):
    """Train the adapters of a model whose linears `nk.swap_linears` has replaced.

    One batch of `per_device_train_batch_size` forget questions holds, as far as the method needs
    them, their safe targets, their undesired answers and retain questions: one forward and one
    backward a step. Checkpoints hold the trainable tensors, optimizer, scheduler and random states
    only, and appear under their name when they are complete. Metrics go to metrics.jsonl of
    `output_dir`, a row each
    `logging_steps`.

    Args:
        model: a causal language model; every trainable parameter is trained and saved.
        args: `TrainingArguments`; evaluation during training is `on_eval`, not `eval_strategy`.
        train_dataset: from `prepare_dataset`.
        objective: the method and its settings.
        tokenizer: gives the padding token.
        retain_stop_ratio: stop when the retain loss, where the method has one, exceeds this many
            times its start; None: never.
        on_eval: hook(step, model) -> dict of floats, called before the first step, every eval_steps
            and after the last; the model is in eval mode, without gradient. Results: `evaluations`.
        eval_steps: of on_eval.
        stop_at: says of on_eval's results whether to stop there; None trains all steps.
        callbacks: further `TrainerCallback`s.

    Raises:
        ValueError: nothing to train.

    Examples:
        >>> from nsru_train.demo.tiny_model import make_llama, train_tokenizer
        >>> forget, retain = [QA("Who is Ann?", "A poet.")], [QA("Who is Bob?", "A cook.")]
        >>> tokenizer = train_tokenizer([qa.question + qa.answer for qa in forget + retain], 300)
        >>> model = make_llama(tokenizer, hidden_size=16, layers=1)  # or load_model(folder)
        >>> report = nk.swap_linears(model, "all-linear", rank=2, alpha=4)
        >>> dataset = prepare_dataset(model, tokenizer, forget, retain)
        >>> args = TrainingArguments("run", max_steps=2, use_cpu=True, disable_tqdm=True)
        >>> NSRUTrainer(model, args, dataset, Objective(), tokenizer).train().global_step
        2
    """

    # compute_loss weighs a micro-batch by its share of the step; Trainer would weigh all alike.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: UnlearnDataset,
        objective: Method,
        tokenizer: PreTrainedTokenizerBase,
        *,
        retain_stop_ratio: float | None = TrainConfig.retain_stop_ratio,
        on_eval: Callable[[int, nn.Module], Mapping[str, float]] | None = None,
        eval_steps: int = 10,
        stop_at: Callable[[Mapping[str, float]], bool] | None = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "NSRUTrainer: model has no trainable parameter; call nk.swap_linears first."
            )
        train_dataset.check_for(objective)
        check_sequences(model, train_dataset.sequences())
        refuse_zero_3(args.deepspeed_plugin)
        by_accelerate = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"
        if args.torch_compile or by_accelerate:
            raise ValueError(
                "NSRUTrainer: torch_compile=True (or ACCELERATE_DYNAMO_BACKEND) would compile the "
                "loss, whose shapes depend on the data. Compile the backbone instead: "
                "model.base_model.compile()."
            )
        if args.label_smoothing_factor:
            raise ValueError(
                "NSRUTrainer: label_smoothing_factor is read by no method's loss; leave it at 0."
            )
        sampling = getattr(args, "train_sampling_strategy", "random")
        if args.data_seed is not None or sampling != "random":
            raise ValueError(
                "NSRUTrainer: data_seed and train_sampling_strategy have no effect, because the "
                "dataset has an order of its own; give seed to make_train_dataset."
            )
        by_epoch = "epoch" in (args.save_strategy, args.eval_strategy)
        if args.gradient_accumulation_steps > 1 and by_epoch:
            logger.warning(
                "Steps of several batches run on over the ends of epochs: what is saved or "
                "evaluated by epoch comes after several of them. Give 'steps' and their number."
            )
        if args.n_gpu > 1:
            # DataParallel would copy the whole model every step.
            logger.warning(
                "Using one of %d GPUs; start with torchrun or accelerate launch for all.",
                args.n_gpu,
            )
            args._n_gpu = 1
        if args.ddp_find_unused_parameters is None and args.world_size > 1:
            args.ddp_find_unused_parameters = not _all_take_part(model, train_dataset)
        with _known_as_adapted(model):
            super().__init__(
                model,
                args,
                data_collator=RowCollator(pad_token_id(tokenizer, model)),
                train_dataset=train_dataset,
            )
        if self.is_fsdp_enabled:
            # It cannot spread buffers such as the retain bases, and each process has all weights.
            self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
        self.model_accepts_loss_kwargs = False  # no token count to gather across ranks every step
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):
            self.compute_loss_func = self.compute_loss  # says the same to transformers before 5.19
        self.objective = objective.prepare(model)
        self._state = self.objective.start()
        self._parts = (*objective.parts, "total")
        # Of all parts: since the last log, and in this step.
        self._sums: Tensor | float = 0.0
        self._steps = 0.0
        self._in_step: Tensor | float = 0.0
        self._on_eval = on_eval
        self._best = BestAdapters(Path(args.output_dir, BEST_FILE))
        self.kept_step: int | None = None
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(LossProgressCallback(objective.parts))
        self._early_stop = (
            EarlyStopCallback(retain_stop_ratio)
            if retain_stop_ratio is not None and "retain" in objective.parts
            else None
        )
        self.add_callback(
            GradientCheckCallback(
                self.is_deepspeed_enabled, args.fp16, lambda name: self._phase.rate(name) == 0
            )
        )
        # Before the evaluation hook, whose time is not a step's.
        self.add_callback(MetricsCallback(RunFolder(args.output_dir), self._parts))
        if self._early_stop is not None:
            self.add_callback(self._early_stop)
        if on_eval is not None:
            self.add_callback(EvalHookCallback(self._evaluated, eval_steps, self.log, stop_at))
        elif objective.keeps_best:
            raise ValueError("NSRUTrainer: on_eval must be given: this method keeps the best step.")
        for callback in callbacks:
            self.add_callback(callback)

    @property
    def _phase(self) -> Method:
        """The method in the phase that the step in progress belongs to."""
        return self.objective.at(self.state.global_step / max(1, self.state.max_steps))

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """on_eval's results, each with its step; complete also after a resume."""
        return evaluations(self.state.log_history)

    @property
    def early_stop_reason(self) -> str | None:
        return self._early_stop.reason if self._early_stop is not None else None

    def _evaluated(self, step: int, model: nn.Module) -> Mapping[str, float]:
        """The hook's results with the update as it is applied; the best adapters are kept."""
        assert self._on_eval is not None
        hook = functools.partial(self._on_eval, step)
        with scaled_updates(model, self.objective.applied):
            results = inside_forward(model, hook) if self.accelerator.is_fsdp2 else hook(model)
        if self.objective.keeps_best:
            tensors = {name: whole(parameter.detach()) for name, parameter in trainable(model)}
            start = self.evaluations[0] if self.evaluations else results
            try:
                worth = self.objective.score(start, results)
            except KeyError as error:
                raise ValueError(
                    f"on_eval: {type(self.objective).__name__} chooses by {error}, which is not in "
                    f"its results, {', '.join(results)}. `quick_probabilities` gives it."
                ) from error
            if self.args.should_save:
                self._best.consider(tensors, step, worth)
        return results

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        run = RunFolder(self.args.output_dir).lock()
        try:
            if not resume_from_checkpoint:
                self._best.clear()
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            model = self.accelerator.unwrap_model(self.model)
            if self.objective.keeps_best:
                self.accelerator.wait_for_everyone()
                self.kept_step = self._best.restore(model)
            scale_updates(model, self.objective.applied)
            return result
        finally:
            run.unlock()

    def create_optimizer(self, model=None):
        """Parameters whose rate is a multiple of the learning rate form groups of their own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        names = {p: name for name, p in (model or self.model).named_parameters()}
        for group in list(optimizer.param_groups) if made else ():
            by_rate: dict[float, list[Any]] = {1.0: []}
            for parameter in group["params"]:
                by_rate.setdefault(self.objective.rate(names[parameter]), []).append(parameter)
            group["params"] = by_rate.pop(1.0)
            for rate, own in by_rate.items():
                optimizer.add_param_group({**group, "params": own, "lr": rate * group["lr"]})
        return optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        phase = self._phase
        if phase is self.objective:  # it has none, as most methods
            return loss
        if self.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed holds the gradients itself and would train in each phase of this method "
                "what is of another; use DDP or FSDP."
            )
        for name, parameter in trainable(self.accelerator.unwrap_model(model)):
            if phase.rate(name) == 0:
                parameter.grad = None  # the optimizer leaves it and its moments alone
        return loss

    def get_train_dataloader(self):
        args = self.args
        # The dataset has its own order for each epoch, which accelerate tells it by set_epoch.
        self._batches = StepBatches(
            self.train_dataset,
            self._train_batch_size,
            args.gradient_accumulation_steps,
            args.world_size,
            args.dataloader_drop_last,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
        )
        return self.accelerator.prepare(loader)

    def set_initial_training_values(self, args, dataloader):
        if args.max_steps < 0:  # of the questions' epochs, several of which the loader may hold
            args = copy.copy(args)
            epochs = args.num_train_epochs / self._batches.passes
            steps = len(dataloader) / args.gradient_accumulation_steps
            args.max_steps = math.ceil(epochs * steps)
        return super().set_initial_training_values(args, dataloader)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(len(batch["kind"]) for batch in batches)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with _as_forward(self.accelerator.unwrap_model(model), self._objective_forward):
            loss, parts = model(inputs)
        if model.training and not loss.requires_grad:
            raise RuntimeError(
                "the loss does not depend on any trainable parameter. With reentrant gradient "
                "checkpointing call model.enable_input_require_grads(), or set "
                "use_reentrant=False; else see that the adapted modules take part in the forward."
            )
        # Each question of a step weighs the same: all have equally many rows.
        share = 1.0 if num_items_in_batch is None else len(inputs["kind"]) / num_items_in_batch
        values = share * torch.stack([parts[name] for name in self._parts])
        self._sums = self._sums + values
        self._steps += share
        if self._state:
            self._in_step = self._in_step + values
            if self.accelerator.sync_gradients:  # the step's last batch
                epoch = self.state.epoch * self._batches.passes
                parts_of_step = self._over_processes(self._in_step)
                self._state = self.objective.after_step(self._state, epoch, parts_of_step)
                self._in_step = 0.0
        loss = share * loss
        return (loss, parts) if return_outputs else loss

    def _objective_forward(self, model, batch):
        # accelerate puts autocast into the forward that this one stands in for.
        with self.accelerator.autocast():
            return unlearning_loss(model, batch, self._phase, self._state)

    def _over_processes(self, sums: Any) -> dict[str, float]:
        """Means over processes of each one's sums of the parts."""
        means = self.accelerator.gather(sums.unsqueeze(0)).mean(0)
        return dict(zip(self._parts, means.tolist(), strict=True))

    def log(self, logs, start_time=None):
        if "loss" in logs and self._steps:
            logs |= self._over_processes(self._sums / self._steps)
            self._sums, self._steps = 0.0, 0.0
        super().log(logs, start_time)


@contextmanager
def _as_forward(model: nn.Module, function: Callable) -> Iterator[None]:
    """Let model(batch) compute function(model, batch).

    The loss is computed inside the model's forward, because DDP, FSDP and DeepSpeed act there: they
    gather the head's weight before it and prepare the averaging of gradients after it.
    """
    own = model.__dict__.get("forward")
    model.forward = functools.partial(function, model)
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def refuse_zero_3(plugin: DeepSpeedPlugin | None) -> None:
    """Raise ValueError where weights would be whole in calls of their own modules alone."""
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "deepspeed: ZeRO-3 keeps all weights in parts, also where a trained model is scored "
            "and saved. Use zero_stage 1 or 2, or FSDP2, which shards as much "
            "(docs/howto/many-gpus.md)."
        )


def inside_forward(model: nn.Module, function: Callable[[nn.Module], Any]) -> Any:
    """function(model), while ``fully_shard`` holds the root's own weights gathered."""
    with _as_forward(model, function):
        return model()


@contextmanager
def _known_as_adapted(model: nn.Module) -> Iterator[None]:
    """Trainer refuses a quantised model unless this says that adapters are what is trained."""
    model._hf_peft_config_loaded = True  # type: ignore[assignment]
    try:
        yield
    finally:
        del model._hf_peft_config_loaded


def _all_take_part(model: nn.Module, dataset: UnlearnDataset) -> bool:
    """True where every step uses every trainable parameter, as far as one token can tell.

    A router of experts sends one token to fewer of them than there are.
    """
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, nk.NSRULinear)}
    if any(name.rpartition(".")[0] not in adapted for name, _ in trainable(model)):
        return False
    reached: set[str] = set()
    consumers = {name: lambda *_, name=name: reached.add(name) for name in adapted}
    token = torch.tensor([dataset.forget[0].input_ids[:1]])
    names = ["input_ids", *["decoder_input_ids"] * is_encoder_decoder(model)]
    with evaluating(model):
        ActivationStream(model, adapted).feed([dict.fromkeys(names, token)], consumers, None)
    return reached == adapted.keys()
