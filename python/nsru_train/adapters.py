"""Adapter folders of runs, whatever wrote them: plain LoRA, or experts that prompts choose."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from nsru_kernels.hf.peft_format import load_lora_adapter
from nsru_train.routed import CONFIG, load_routed


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Put the adapter that a run saved in ``path`` into its base model, which is changed in place.

    Raises:
        ValueError: it is damaged, or of another model.
    """
    if (Path(path) / CONFIG).is_file():
        load_routed(model, path)
    else:
        load_lora_adapter(model, path)


def check_plain(path: str | os.PathLike[str]) -> None:
    """Raise ValueError where ``path`` holds what is no plain LoRA, for PEFT and merges."""
    if (Path(path) / CONFIG).is_file():
        raise ValueError(
            f"adapter: {path} holds experts that each prompt chooses among: no plain LoRA, to be "
            "merged, repaired or served by PEFT. `nsru eval RUN` judges it; "
            "nsru_train.adapters.load_adapter puts it into a model of transformers."
        )
