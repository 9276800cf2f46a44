"""The CPU extension ``nsru_kernels._cpu``: whether it can serve, and calls into it."""

from __future__ import annotations

import functools
import importlib
import platform
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

from nsru_kernels.dispatch.config import BackendUnavailable

_INTERFACE = 3  # of csrc/cpu/bindings.cpp
KERNEL_DTYPES = frozenset((torch.bfloat16,))
_Matrix = tuple[int, int, int, int, int]  # address, shape, strides


def unavailable(device: torch.device) -> str | None:
    """Reason and remedy where the kernels cannot run on ``device``; None where they can."""
    if device.type != "cpu":
        return "CPU kernels need tensors on the CPU. Use backend='eager'."
    return _unavailable()


@functools.cache
def _unavailable() -> str | None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "CPU kernels are for x86-64 Linux. Use backend='eager'."
    try:
        module = load()
    except ModuleNotFoundError:
        return (
            "the CPU extension is not built: no C++ compiler for AMX at installation, or "
            "NSRU_SKIP_CPU=1. Reinstall where g++ 11 or newer is, or use 'eager'."
        )
    except ImportError as error:
        return f"the CPU extension does not load: {error}. Reinstall it, or use 'eager'."
    if getattr(module, "interface", None) != _INTERFACE:
        return "the CPU extension was built from other sources. Reinstall it, or use 'eager'."
    reason = module.unavailable()
    return f"{reason}. Use backend='eager'." if reason else None


@functools.cache
def load() -> ModuleType:
    """The compiled module. Raises ImportError."""
    return importlib.import_module("nsru_kernels._cpu")


def check_operands(tensor: Tensor, dropout_p: float) -> None:
    """Raises BackendUnavailable for what the CPU kernels do not take."""
    if tensor.dtype not in KERNEL_DTYPES:
        raise BackendUnavailable(f"CPU kernels take bf16, got {tensor.dtype}. Use 'eager'.")
    if dropout_p:
        raise BackendUnavailable(f"CPU kernels know no dropout, got {dropout_p}. Use 'eager'.")


class Arguments:
    """Tensors as the extension takes them: addresses, sizes and strides.

    Lives as long as the call, for it may hold copies. Raises BackendUnavailable for tensors without
    memory.
    """

    def __init__(self) -> None:
        self._read: list[Tensor] = []

    def matrix(self, tensor: Tensor) -> _Matrix:
        """Address, shape and strides. Copies a tensor without contiguous rows or columns, so no
        output may be one."""
        if tensor.is_neg():
            tensor = tensor.resolve_neg()
        strides = tensor.stride()
        if 1 not in strides:
            tensor = tensor.contiguous()
            strides = tensor.stride()
        return (self._address(tensor), *tensor.shape, *strides)

    def maybe(self, tensor: Tensor | None) -> _Matrix | None:
        """``matrix``; None for None."""
        return None if tensor is None else self.matrix(tensor)

    def vector(self, tensor: Tensor | None) -> int:
        """The address of contiguous elements; 0 for None."""
        if tensor is None:
            return 0
        if tensor.is_neg():
            tensor = tensor.resolve_neg()
        return self._address(tensor.contiguous())

    def _address(self, tensor: Tensor) -> int:
        plain = type(tensor) in (Tensor, Parameter)
        address = tensor.data_ptr() if plain else 0
        if not address and (tensor.numel() or not plain):
            raise BackendUnavailable(
                f"CPU kernels read plain tensors, got a {type(tensor).__name__} without memory of "
                "its own. Use 'eager'."
            )
        self._read.append(tensor)
        return address
