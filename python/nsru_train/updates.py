"""Besides training: adapters scaled as their method applies them, and the best ones kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

import nsru_kernels as nk
from nsru_kernels.files import atomic_write, read_tensors
from nsru_kernels.nn.sharded import shards_like


def scale_updates(model: nn.Module, factor: float) -> None:
    """Multiply the update of every adapter."""
    if factor != 1.0:
        with torch.no_grad():
            for parameter in _lora_b(model):
                parameter.mul_(factor)


@contextmanager
def scaled_updates(model: nn.Module, factor: float) -> Iterator[None]:
    """In the block the update of every adapter is multiplied."""
    if factor == 1.0:  # as almost everywhere: nothing to copy at each evaluation
        yield
        return
    saved = [parameter.detach().clone() for parameter in _lora_b(model)]
    scale_updates(model, factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(_lora_b(model), saved, strict=True):
                parameter.copy_(value)


class BestAdapters:
    """The trained tensors of the best evaluation so far, in a file that a resumed run reads.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)

    def consider(self, tensors: Mapping[str, Tensor], step: int, score: float | None) -> None:
        """Keep the trained tensors of a model if ``score`` is above the one that is kept."""
        if score is None or (self.path.exists() and score <= float(self._read()[1]["score"])):
            return
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        atomic_write(self.path, save(tensors, {"step": str(step), "score": repr(score)}))

    def restore(self, model: nn.Module) -> int | None:
        """Put the kept tensors into the model; the step that they are of, None without any."""
        if not self.path.exists():
            return None
        tensors, metadata = self._read()
        with torch.no_grad():
            for name, parameter in trainable(model):
                parameter.copy_(shards_like(tensors[name], parameter))
        return int(metadata["step"])

    def _read(self):
        return read_tensors(self.path)


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Trained parameters by name."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _lora_b(model: nn.Module) -> list[nn.Parameter]:
    return [m.lora_B for m in model.modules() if isinstance(m, nk.NSRULinear)]
