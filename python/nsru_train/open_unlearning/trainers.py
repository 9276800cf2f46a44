"""Trainers for OpenUnlearning's programs: our methods, and its own on our adapters."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

import nsru_kernels as nk
from nsru_kernels.nn.inputs import evaluating
from nsru_kernels.nn.swap import match_linears
from nsru_kernels.subspaces.collection import fingerprint_weights
from nsru_train.config import LoraConfig, SubspaceConfig, TrainConfig
from nsru_train.data.encode import Encoded
from nsru_train.data.safe_targets import SafeTargets
from nsru_train.estimating import encoded_batches, subspaces_of
from nsru_train.losses.batch import SAFE
from nsru_train.methods import Method, find_method
from nsru_train.open_unlearning.items import encode, encode_safe
from nsru_train.open_unlearning.mapping import LOW_RATE
from nsru_train.pipeline import add_adapters
from nsru_train.trainer import UnlearnDataset, encoded_nll

logger = logging.getLogger(__name__)


def why_not(method: str) -> str | None:
    """Why a method of ours cannot run in their program; None where it can."""
    made = find_method(method)()
    if not made.trains:
        return "it trains no adapters"
    if made.keeps_best:
        return "it chooses among its evaluations, and theirs give it no numbers"
    if made.applied != 1 or type(made).save is not Method.save:
        return "what it trains is no plain update of the weights"
    return None


class Merging(Trainer):
    """The model is saved as an ordinary one with the update in it, and the adapter beside it.

    Checkpoints on the way are PEFT folders, which transformers reads by path as well.
    """

    tokenizer: Any
    fingerprint: str

    def save_model(self, output_dir=None, _internal_call=False):
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        network = self.accelerator.unwrap_model(self.model)
        adapter = folder if _internal_call else folder / "adapter"
        nk.save_lora_adapter(network, adapter, metadata={"fingerprint": self.fingerprint})
        if not _internal_call:
            nk.merge_adapters(network)
            network.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


class AdaptersOff:
    """The model as it was before training, which their methods call as a model of its own."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, **inputs: Any) -> Any:
        with nk.adapters_disabled(self._model), evaluating(self._model):
            return self._model(**inputs)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        return self._model.named_modules()


class OnAdapters(Merging):
    """One of their methods that trains our adapters instead of the whole model."""

    def __init__(
        self, *, model, args, train_dataset, tokenizer, lora=None, subspace=None, **kwargs
    ) -> None:
        self.fingerprint = fingerprint_weights(model)
        asked = kwargs.get("trainable_params_regex")  # RMU's choice of weights
        put_adapters(
            model,
            args,
            tokenizer,
            list(encode(train_dataset.forget, "forget").values()),
            list(encode(train_dataset.retain, "retain").values()),
            lora=LoraConfig(**plain(lora)),
            subspace=SubspaceConfig(**plain(subspace)),
            weights=None if asked is None else list(asked),
        )
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, tokenizer=tokenizer, **kwargs
        )

    def _prepare_ref_model(self, model):
        return AdaptersOff(model)

    def create_optimizer(self, *args, **kwargs):
        # Not RMU's, which lets gradients of all weights be computed.
        return Trainer.create_optimizer(self, *args, **kwargs)


class Ours(Merging):
    """Our methods in our training loop, on their data, with their evaluation.

    Args:
        method: name of one of ours.
        objective: its settings.
        lora, subspace: the adapters and the retain subspaces, as in `nsru train`.
        retain_per_forget: retain items for each forget item.
        retain_stop_ratio: stop when the retain loss exceeds this many times its start.
        safe_targets: template or refusal file for methods that teach another answer, where the
            forget set brings none (QAwithIdkDataset, QAwithAlternateDataset do).
    """

    def __init__(
        self,
        *,
        model,
        args,
        train_dataset,
        tokenizer,
        evaluators=None,
        template_args=None,
        eval_dataset=None,
        data_collator=None,
        method="nsru",
        objective=None,
        lora=None,
        subspace=None,
        retain_per_forget=TrainConfig.retain_per_forget,
        retain_stop_ratio=TrainConfig.retain_stop_ratio,
        safe_targets=None,
    ) -> None:
        if (reason := why_not(method)) is not None:
            raise ValueError(
                f"trainer.method_args.method: {method} is left to nsru train: {reason}"
            )
        if train_dataset.anchor != "forget":
            raise ValueError(
                f"data.anchor must be forget for this trainer, got {train_dataset.anchor}: an "
                "epoch is a pass over what is forgotten."
            )
        chosen = find_method(method)(**plain(objective))
        chosen.check_weights()
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint_weights(model)
        indexed = encode(train_dataset.forget, "forget")
        forget = list(indexed.values())
        retain = list(encode(train_dataset.retain, "retain").values())
        safe: list[list[Encoded]] = [[item] for item in forget]  # of a method that reads none
        if SAFE in chosen.rows:
            draws = max(1, round(args.num_train_epochs)) if args.max_steps < 0 else 1
            templates = SafeTargets.from_file(safe_targets)
            safe = encode_safe(train_dataset.forget, indexed, templates, draws)
        put_adapters(
            model,
            args,
            tokenizer,
            forget,
            retain,
            lora=LoraConfig(**plain(lora)),
            subspace=SubspaceConfig(**plain(subspace)),
            targets=chosen.targets(model),
        )
        if chosen.starts_elsewhere:
            chosen.begin(model, *(_in_twos(model, tokenizer, items) for items in (forget, retain)))
        ref_safe = None
        if SAFE in chosen.ref_nll:
            found = iter(encoded_nll(model, tokenizer, list(itertools.chain(*safe))))
            ref_safe = [[next(found) for _ in some] for some in safe]
        dataset = UnlearnDataset(
            safe,
            forget,
            retain,
            encoded_nll(model, tokenizer, forget),
            ref_safe=ref_safe,
            kinds=chosen.rows,
            alternatives=chosen.alternatives,
            retain_per_forget=retain_per_forget,
            seed=args.seed,
        )
        with _no_dataset_needed(args):
            super().__init__(
                evaluators=evaluators,
                template_args=template_args,
                model=model,
                args=args,
                train_dataset=dataset,
                objective=chosen,
                tokenizer=tokenizer,
                retain_stop_ratio=retain_stop_ratio,
            )


def put_adapters(
    model: nn.Module,
    args: TrainingArguments,
    tokenizer: Any,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    *,
    lora: LoraConfig,
    subspace: SubspaceConfig,
    targets: Sequence[str] | None = None,
    weights: Sequence[str] | None = None,
) -> None:
    """Swap the model's linears, before there is an optimizer, and say what was swapped.

    Args:
        targets: linears that the method adapts; None: those of ``subspace``.
        weights: regular expressions for names of weights; only linears that one fits are adapted.

    Raises:
        ValueError: DeepSpeed, or weights that are in no linear.
    """
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ValueError(
            "trainer: adapters need no DeepSpeed and do not run under it here; start with python, "
            "or accelerate launch with a configuration without it."
        )
    if args.learning_rate <= LOW_RATE:
        logger.warning(
            "trainer.args.learning_rate %g is one of full fine-tuning: adapters hardly move. 1e-4 "
            "to 5e-4 are usual.",
            args.learning_rate,
        )
    if getattr(model, "hf_device_map", None) is None:
        model.to(args.device)
    if weights is not None:
        named = [name for name, _ in match_linears(model, subspace.targets, subspace.exclude)]
        targets = [
            re.escape(name)
            for name in named
            if any(re.fullmatch(pattern, f"{name}.weight") for pattern in weights)
        ]
        if not targets:
            raise ValueError(
                f"trainable_params_regex: {', '.join(weights)} fits the weight of no linear layer, "
                "and adapters are on those alone."
            )
    if targets is not None:
        subspace = SubspaceConfig(**{**asdict(subspace), "targets": list(targets)})
    subspaces = None
    if lora.project:
        subspaces = subspaces_of(model, tokenizer, forget, retain, subspace, seed=args.seed)
        print(subspaces.table())
    [first] = encoded_batches(model, tokenizer, forget[:1], max_tokens=1)
    print(
        add_adapters(
            model,
            subspace.targets,
            lora,
            exclude=subspace.exclude,
            subspaces=subspaces,
            batch=first,
        )
    )
    if args.gradient_checkpointing:
        # The embedding is frozen: what is recomputed would have no gradient to bring.
        model.enable_input_require_grads()  # type: ignore[operator]


def _in_twos(model: nn.Module, tokenizer: Any, items: Sequence[Encoded]) -> list[dict[str, Tensor]]:
    pairs = (items[i : i + 2] for i in range(0, len(items), 2))
    longest = max(map(len, items))
    return [encoded_batches(model, tokenizer, two, max_tokens=2 * longest)[0] for two in pairs]


@contextmanager
def _no_dataset_needed(args: TrainingArguments) -> Iterator[None]:
    """Trainer refuses an eval_strategy without a dataset, which their evaluation brings itself."""
    strategy, args.eval_strategy = args.eval_strategy, IntervalStrategy.NO
    try:
        yield
    finally:
        args.eval_strategy = strategy


def plain(settings: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    if settings is None:
        return {}
    return (
        OmegaConf.to_container(settings, resolve=True)
        if OmegaConf.is_config(settings)
        else settings
    )
