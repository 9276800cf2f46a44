"""The folder ``adapter`` of a run: plain LoRA, routed experts, or a guard of prompts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from nsru_kernels.hf.peft_format import load_lora_adapter
from nsru_kernels.subspaces.collection import fingerprint_weights
from nsru_train.guard import WEIGHT, EcoGuard
from nsru_train.methods import Method
from nsru_train.routed import CONFIG, load_routed


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    method: Method | None = None,
    *,
    fingerprint: str | None = None,
) -> Path:
    """Write what was trained for `load_adapter`: a folder of plain LoRA, as PEFT and vLLM read it.

    The files appear whole or not at all. A method with adapters of its own form, or with a guard,
    writes these instead.

    Args:
        model: has the adapters, float32, A [R, K] and B [N, R] for each layer; none is merged.
        path: folder, made if need be.
        method: that trained them; None writes plain LoRA.
        fingerprint: of the base weights, by which another base model is refused later; None takes
            it of ``model``, which must then not be sharded.

    Returns:
        The folder.

    Raises:
        ValueError: there is nothing to save, it is no plain LoRA, or it holds NaN or infinite
            values.
        OSError: the folder cannot be written; an adapter that was there before is unharmed.
    """
    folder, fingerprint = Path(path), fingerprint or fingerprint_weights(model)
    (method or Method()).save(model, folder, {"fingerprint": fingerprint})
    return folder


def load_adapter(model: nn.Module, path: str | os.PathLike[str], tokenizer: Any = None) -> None:
    """Put what a run saved in ``path`` into its base model, which is changed in place.

    Args:
        model: the base model, without adapters.
        path: folder of `save_adapter`, or RUN/adapter of `nsru train`.
        tokenizer: of the model; a guard reads prompts by it, others need none.

    Raises:
        ValueError: it is damaged, or of another model, or a guard came without a tokenizer.
    """
    if (Path(path) / CONFIG).is_file():
        load_routed(model, path)
    elif (Path(path) / WEIGHT).is_file():
        if tokenizer is None:
            raise ValueError(f"load_adapter: {path} holds a guard; give the model's tokenizer too.")
        EcoGuard.load(path).attach(model, tokenizer)
    else:
        load_lora_adapter(model, path)


def is_plain(path: str | os.PathLike[str]) -> bool:
    """True where ``path`` holds nothing but plain LoRA."""
    return not any((Path(path) / name).is_file() for name in (CONFIG, WEIGHT))


def check_plain(path: str | os.PathLike[str]) -> None:
    """Raise ValueError where ``path`` holds what is no plain LoRA, for PEFT and merges."""
    if is_plain(path):
        return
    what = "experts that each prompt chooses among"
    inside = Path(path, "adapter")
    if (Path(path) / WEIGHT).is_file():
        what = "a guard of prompts, which is no part of the weights"
    hint = f" Its flagged prompts get the adapter of --adapter {inside}." if inside.is_dir() else ""
    raise ValueError(
        f"adapter: {path} holds {what}: no plain LoRA, to be merged, repaired or served by PEFT. "
        "`nsru eval RUN` judges it; nsru_train.adapters.load_adapter puts it into a model of "
        f"transformers.{hint}"
    )
