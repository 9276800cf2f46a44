"""`transformers.Trainer` with small, atomic checkpoints that are checked before a run goes on."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.utils._pytree import tree_map
from transformers import Trainer
from transformers.trainer import (
    OPTIMIZER_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TrainerState,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_NAME

from nsru_kernels.files import check_fields
from nsru_kernels.nn.sharded import shards_like, whole
from nsru_train.checkpoints import (
    SUMS,
    blaming,
    changed_files,
    check_alike,
    check_files,
    check_optimizer,
    digest,
    process_count,
    rotate,
    write_sums,
)
from nsru_train.updates import trainable

REFERENCE_FILE = "reference_nll.json"
STATE_KEY = "state of the method"
# What training reads of a checkpoint's trainer_state.json.
_STATE = {
    "global_step": int,
    "log_history": list[dict],
    "total_flos": float,
    "num_input_tokens_seen": int,
    "train_batch_size": int | None,
    "best_model_checkpoint": str | None,
}


class CheckpointError(OSError):
    """A checkpoint could not be written; the one before is untouched."""


class ResumableTrainer(Trainer):
    """Checkpoints hold the trainable tensors, optimizer, scheduler and random states only.

    They appear under their name when they are complete. A run resumes from one that is whole and
    belongs to the same base model, bases and data.

    Attributes:
        settings: name → value of what else must be as it was.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._staging: Path | None = None
        self._belongs_to: dict[str, str] = {}
        self.settings: dict[str, str] = {}
        self._state: dict[str, float] = {}  # of the method

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        saves = self.args.save_strategy != "no"
        if self.args.should_save and (saves or resume_from_checkpoint):
            # Before sharding; once, for it reads all weights.
            self._belongs_to = {**self._base_digests(), **self.train_dataset.digests()}
        if isinstance(resume_from_checkpoint, (str, Path)):
            self._check_checkpoint(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        # A checkpoint of the last step, within an epoch, from which transformers takes one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model, trial):
        """Write into output_dir/.partial, then rename: a folder checkpoint-N is always complete."""
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        partial = run_dir / ".partial"
        previous = get_last_checkpoint(str(run_dir)) if run_dir.is_dir() else None
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = partial
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if not self._engine_saves:
                    write_sums(partial / name)
                _publish(partial / name, run_dir / name)
        except Exception as error:  # torch reports a full disk as a RuntimeError
            shutil.rmtree(partial, ignore_errors=True)
            kept = f"{previous} is complete" if previous else "there is no earlier one"
            raise CheckpointError(
                getattr(error, "errno", None) or errno.EIO,
                f"{name} could not be written ({error}); {kept}. Free space and resume: "
                "nsru train --resume true, or resume_from_checkpoint=True in Python",
                str(run_dir / name),
            ) from error
        finally:
            self._staging = None
        if self.args.should_save:
            shutil.rmtree(partial)
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate(run_dir, limit, run_dir / name, best)

    def save_model(self, output_dir=None, _internal_call=False):
        if self.accelerator.is_fsdp2:
            self._save(output_dir)  # Trainer would gather all weights
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir):
        """The optimizer's state whole, as an unsharded run writes it."""
        if not self.accelerator.is_fsdp2:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = tree_map(whole, self._torch_optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _save(self, output_dir=None, state_dict=None):
        """Trainable tensors and the reference NLL, nothing frozen."""
        trained = dict(trainable(self.accelerator.unwrap_model(self.model)))
        if state_dict is None:
            state_dict = {name: whole(parameter) for name, parameter in trained.items()}
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().contiguous().cpu() for k, v in state_dict.items() if k in trained}
        metadata = {"format": "pt", **self._belongs_to, **self.settings}
        if self._state:
            metadata[STATE_KEY] = json.dumps(self._state)
        data = safetensors.torch.save(tensors, metadata=metadata)
        (folder / SAFE_WEIGHTS_NAME).write_bytes(data)
        (folder / REFERENCE_FILE).write_text(json.dumps(self.train_dataset.ref_nll))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # Shards, which accelerate saved beside the trainable tensors.
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            if self._state:
                raise ValueError(
                    f"resume_from_checkpoint: shards do not hold {', '.join(self._state)}, which "
                    "this method needs; start a new run."
                )
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder = Path(resume_from_checkpoint)
        saved = safetensors.torch.load_file(folder / SAFE_WEIGHTS_NAME)
        parameters = dict(trainable(self.accelerator.unwrap_model(model or self.model)))
        shapes = {k: p.shape for k, p in parameters.items()}
        odd = {k: v.shape for k, v in saved.items()}.items() ^ shapes.items()
        if odd:
            raise ValueError(
                f"resume_from_checkpoint: {folder} was written with other adapters, such as "
                f"{min(odd)}; use the same targets and rank, or start a new run."
            )
        with self._blaming(folder, SAFE_WEIGHTS_NAME):
            check_alike(saved, parameters, "model")
        if self._state:
            with self._blaming(folder, SAFE_WEIGHTS_NAME):
                with safetensors.safe_open(folder / SAFE_WEIGHTS_NAME, "pt") as file:
                    state = json.loads((file.metadata() or {}).get(STATE_KEY, "null"))
                check_alike(state, self._state, "method")
            self._state = state
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(shards_like(saved[name], parameter))

    @property
    def _torch_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it

    @property
    def _engine_saves(self) -> bool:
        """True where checkpoints hold shards in the format of FSDP1 or DeepSpeed."""
        fsdp1 = self.is_fsdp_enabled and not self.accelerator.is_fsdp2
        return fsdp1 or self.is_deepspeed_enabled

    def _load_whole(self, folder: Path) -> None:
        """Optimizer and scheduler of a sharded model from a checkpoint."""
        optimizer = self._torch_optimizer
        read = functools.partial(torch.load, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(read(folder / OPTIMIZER_NAME))
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    state[name] = shards_like(value, parameter)
        self.lr_scheduler.load_state_dict(read(folder / SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or self._engine_saves:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = self._torch_optimizer
        groups = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        schedule = self.lr_scheduler.state_dict()
        with self._blaming(checkpoint, f"{OPTIMIZER_NAME} or {SCHEDULER_NAME}"):
            if self.accelerator.is_fsdp2:
                self._load_whole(Path(checkpoint))
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
            check_optimizer(optimizer, groups)
            check_alike(self.lr_scheduler.state_dict(), schedule, "schedule")
        with self._blaming(checkpoint, SUMS):
            changed = changed_files(Path(checkpoint))
        for name in changed:
            with self._blaming(checkpoint, name):
                raise ValueError("it is not the file that was saved there, but can be read")

    def _load_scaler(self, checkpoint):
        with self._blaming(checkpoint, SCALER_NAME):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with self._blaming(checkpoint, self._rng_file()):
            super()._load_rng_state(checkpoint)

    def _rng_file(self) -> str:
        alone = self.args.world_size <= 1
        return "rng_state.pth" if alone else f"rng_state_{self.args.process_index}.pth"

    def _checkpoint_files(self) -> list[str]:
        """Names of a checkpoint's files; shards are the engine's, which looks for them itself."""
        if self._engine_saves:
            return [TRAINER_STATE_NAME]
        scaler = [SCALER_NAME] if getattr(self.accelerator, "scaler", None) is not None else []
        return [
            *(SAFE_WEIGHTS_NAME, REFERENCE_FILE, OPTIMIZER_NAME, SCHEDULER_NAME),
            *(TRAINER_STATE_NAME, self._rng_file(), *scaler),
        ]

    def _blaming(self, checkpoint, name: str):
        return blaming(Path(checkpoint), name, self._checkpoint_files())

    def _check_checkpoint(self, folder: Path) -> None:
        """Refuse to resume, before anything changes, from what is damaged or of another run."""
        files = self._checkpoint_files()
        count = process_count(folder)
        if count and count != self.args.world_size and not self._engine_saves:
            raise ValueError(
                f"resume_from_checkpoint: {folder} was written by {count} process"
                f"{'es' * (count > 1)}, and this run has {self.args.world_size}; resume with as "
                f"many (torchrun --nproc-per-node {count}), or start a new run."
            )
        check_files(folder, files)
        with self._blaming(folder, TRAINER_STATE_NAME):
            path = folder / TRAINER_STATE_NAME
            state = vars(TrainerState.load_from_json(str(path)))
            check_fields(path, state, _STATE)
            for entry in state["log_history"]:
                check_fields(path, entry, {"step": int})
                if not isinstance(entry.get("retain", 0.0), (int, float)):
                    raise TypeError(f"retain must be a number, got {entry['retain']!r:.60}")
            step = folder.name.removeprefix("checkpoint-")
            if state["global_step"] < 0 or step.isdecimal() != (step == str(state["global_step"])):
                raise ValueError(
                    f"global_step must be that of its folder, got {state['global_step']}"
                )
        if SAFE_WEIGHTS_NAME not in files:
            return
        self._load_rng_state(folder)  # loaded again when training starts
        self._check_reference(folder)
        with safetensors.safe_open(folder / SAFE_WEIGHTS_NAME, "pt") as file:
            saved = file.metadata() or {}  # before there were digests: none
        for name, wanted in {**self.settings, **self._belongs_to}.items():
            if (was := saved.get(name, wanted)) != wanted:
                change = f"{name} was {was}" if name in self.settings else f"the {name} changed"
                raise ValueError(
                    f"resume_from_checkpoint: {folder} belongs to another run: {change}. "
                    "Resume with what it was, or start a new run."
                )

    def _check_reference(self, folder: Path) -> None:
        """The reference NLL tells whether base model and forget set are still the same."""
        with self._blaming(folder, REFERENCE_FILE):
            saved = [float(value) for value in json.loads((folder / REFERENCE_FILE).read_text())]
        current = self.train_dataset.ref_nll
        if len(saved) != len(current) or not all(
            abs(a - b) <= 1e-2 * max(1.0, abs(a)) for a, b in zip(saved, current, strict=True)
        ):
            raise ValueError(
                f"resume_from_checkpoint: {folder} belongs to another base model or forget set: "
                "its reference NLL differs. Resume with the same ones, or start a new run."
            )
        self.train_dataset.ref_nll[:] = saved

    def _base_digests(self) -> dict[str, str]:
        trained = dict(trainable(self.model))
        frozen = {k: v for k, v in self.model.state_dict().items() if k not in trained}
        bases = {name for name in frozen if name.endswith("subspace.basis")}
        return {
            "base model's weights": digest((k, v) for k, v in frozen.items() if k not in bases),
            "retain bases": digest((k, v) for k, v in frozen.items() if k in bases),
            "base model's config": _config_digest(self.model.config),
        }


def _config_digest(config: Any) -> str:
    """Of what a model's config says about how it computes, not of where it came from."""
    kept = {
        name: value
        for name, value in config.to_dict().items()
        if not name.startswith("_") and name not in ("transformers_version", "use_cache")
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _publish(source: Path, destination: Path) -> None:
    """Flush every file of a folder to the disk, then give the folder its final name."""
    for path in source.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if destination.exists():  # left by an earlier run of the same folder
        os.replace(destination, source.parent / "replaced")
    os.replace(source, destination)
