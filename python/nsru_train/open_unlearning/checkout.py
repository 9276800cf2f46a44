"""A checkout of OpenUnlearning: its modules, our trainers among its own, and current packages."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from nsru_train.config import LoraConfig, SubspaceConfig, TrainConfig
from nsru_train.methods import METHODS
from nsru_train.open_unlearning.trainers import OnAdapters, Ours, plain, why_not
from nsru_train.trainer import NSRUTrainer

# Names of its modules, which stand at the top of src.
_PARTS = ("data", "model", "trainer", "evals")


def use_checkout(repo: str | Path) -> Path:
    """Put a checkout's src on the path and import it.

    Returns:
        the checkout, as an absolute path.

    Raises:
        ValueError: it is none, a package that it needs is not installed, or another module has the
            name of one of its.
    """
    root = Path(repo).resolve()
    source = root / "src"
    if missing := [p for p in ("src/train.py", "configs/unlearn.yaml") if not (root / p).is_file()]:
        raise ValueError(
            f"repo: {root} has no {missing[0]}; give a checkout of locuslab/open-unlearning."
        )
    if str(source) not in sys.path:
        sys.path.insert(0, str(source))
    try:
        importlib.import_module("hydra")
        parts = [importlib.import_module(part) for part in _PARTS]
    except ModuleNotFoundError as error:
        raise ValueError(
            f"OpenUnlearning needs {error.name}, which is not installed: pip install "
            f"{'hydra-core' if error.name == 'hydra' else error.name}. {root / 'requirements.txt'} "
            "lists all; the versions that it pins are not needed."
        ) from error
    for part in parts:
        if not Path(str(part.__file__)).resolve().is_relative_to(source):
            raise ValueError(
                f"repo: module {part.__name__!r} comes from {part.__file__}, not from {source}; "
                "take it off the path."
            )
    return root


def register() -> None:
    """Add our trainers to those of the imported checkout, and let its own run on transformers 5."""
    import data
    import model
    import trainer
    from hydra.core.config_store import ConfigStore
    from trainer.base import FinetuneTrainer
    from trainer.unlearn.base import UnlearnTrainer

    if "NSRU" in trainer.TRAINER_REGISTRY:
        return
    registry = trainer.TRAINER_REGISTRY

    def add(name: str, handler: str, base: str, settings: dict[str, Any]) -> None:
        node = {"defaults": [base, "_self_"], "handler": handler, "method_args": settings}
        ConfigStore.instance().store(name, node, group="trainer", provider="nsru_train")

    subspace = {"subspace": asdict(SubspaceConfig())}
    for name, theirs in list(registry.items()):
        if not issubclass(theirs, FinetuneTrainer):
            continue
        registry[name] = _named(name, _Current, theirs)
        if issubclass(theirs, UnlearnTrainer):
            made = f"{name}_LoRA"
            registry[made] = _named(made, OnAdapters, registry[name])
            add(made, made, name, {"lora": asdict(LoraConfig(project=False)), **subspace})
    registry["NSRU"] = _named("NSRU", Ours, FinetuneTrainer, NSRUTrainer)
    for method, kind in METHODS.items():
        if why_not(method) is None:
            settings = {
                "method": method,
                "objective": asdict(kind()),
                "lora": asdict(LoraConfig()),
                **subspace,
                "retain_per_forget": TrainConfig.retain_per_forget,
                "retain_stop_ratio": TrainConfig.retain_stop_ratio,
                "safe_targets": None,
            }
            name = "NSRU" if method == "nsru" else f"NSRU_{method}"
            add(name, "NSRU", "finetune", settings)
    trainer.load_trainer_args = _current_arguments(trainer.load_trainer_args)
    model.get_tokenizer = _current_tokenizer(model.get_tokenizer)
    data.QADataset.__init__ = _plain_few_shot(data.QADataset.__init__)


def _named(name: str, *bases: type) -> type:
    return type(name, bases, {"__doc__": bases[0].__doc__})


def _current_arguments(load: Any) -> Any:
    """`load_trainer_args` without a GPU, and without what TrainingArguments no longer has."""

    @functools.wraps(load)
    def loaded(settings: Any, dataset: Any) -> TrainingArguments:
        settings = plain(settings)
        epochs = settings.pop("warmup_epochs", None)
        if epochs:
            batch = settings["per_device_train_batch_size"]
            step = batch * settings["gradient_accumulation_steps"]
            devices = max(1, torch.cuda.device_count())
            settings["warmup_steps"] = int(epochs * len(dataset) // (step * devices))
        folder = settings.pop("logging_dir", None)
        if folder is not None:
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", folder)
        # Their YAML says None, which is a text there.
        return load({k: None if v == "None" else v for k, v in settings.items()}, dataset)

    return loaded


def _current_tokenizer(get: Any) -> Any:
    """`get_tokenizer`, whose tokenizers give token ids alone for a chat, as they did."""

    @functools.wraps(get)
    def got(*args: Any, **kwargs: Any) -> Any:
        tokenizer = get(*args, **kwargs)
        tokenizer.apply_chat_template = functools.partial(
            tokenizer.apply_chat_template, return_dict=False
        )
        return tokenizer

    return got


def _plain_few_shot(init: Any) -> Any:
    """`QADataset.__init__`, whose examples are lists, to which a question can be added."""

    @functools.wraps(init)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.fs_data is not None:
            self.fs_data = {key: list(column) for key, column in self.fs_data.items()}

    return initialise


class _Current(Trainer):
    """One of their trainers, written for transformers 4.45, on transformers 5."""

    def __init__(self, *, tokenizer, train_dataset=None, eval_dataset=None, **kwargs) -> None:
        self.tokenizer = tokenizer  # their evaluate reads it
        # An eval_strategy asks for a dataset; their evaluate does not look at it.
        stand_in = train_dataset if eval_dataset is None else eval_dataset
        super().__init__(
            processing_class=tokenizer,
            train_dataset=train_dataset,
            eval_dataset=stand_in,
            **kwargs,
        )
        # Their losses are means of a micro-batch, which all count alike.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)
