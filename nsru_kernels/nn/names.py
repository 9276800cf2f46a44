"""Names of modules as the plain model has them, whatever wraps the model or its layers."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

COMPILED = "._orig_mod"  # ends the name of what a compiled layer was made of
# Of torch.compile, checkpoint_wrapper and FSDP1.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def check_module(model: object) -> None:
    """Raise TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r:.80}.")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel and the like."""
    check_module(model)
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel, AveragedModel)):
            model = model.module
        elif inside := [m for name in _WRAPPED if (m := model._modules.get(name)) is not None]:
            model = inside[0]
        else:
            return model


def plain_name(name: str) -> str:
    """The name of a module or parameter without the parts that wrapped layers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)
