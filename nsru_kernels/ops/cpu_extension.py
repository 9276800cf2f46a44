"""The CPU extension ``nsru_kernels._cpu``: whether it can serve, and calls into it."""

from __future__ import annotations

import functools
import importlib
import platform
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from nsru_kernels.config import BackendUnavailable

_INTERFACE = 2  # of csrc/cpu/bindings.cpp
KERNEL_DTYPES = frozenset((torch.bfloat16,))
_Matrix = tuple[int, int, bool]


def unavailable(op: str, device: torch.device) -> str | None:
    """Why the kernels, of any op, cannot run on ``device`` and what to do; None where they can."""
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


def load() -> ModuleType:
    """The compiled module. Raises ImportError."""
    return importlib.import_module("nsru_kernels._cpu")


def check_operands(op: str, tensor: Tensor, dropout_p: float = 0.0) -> None:
    """Raises BackendUnavailable for what the CPU kernels do not take."""
    if tensor.dtype not in KERNEL_DTYPES:
        raise BackendUnavailable(f"{op}: CPU kernels take bf16, got {tensor.dtype}. Use 'eager'.")
    if dropout_p:
        raise BackendUnavailable(
            f"{op}: CPU kernels know no dropout, got {dropout_p}. Use 'eager'."
        )


class Output(NamedTuple):
    """``out`` becomes scale · Σ left · right + bias; ``terms`` are (index of left, right)."""

    out: Tensor  # [M, N], rows or columns contiguous
    terms: Sequence[tuple[int, Tensor]]  # right [depth, N]
    scale: float = 1.0
    bias: Tensor | None = None  # [N], where rows of ``out`` are contiguous


class Narrow(NamedTuple):
    """A product of one left operand that is computed first and written out; times ``scale``,
    rounded, it is a left operand itself."""

    product: Output
    scale: float


class Product(NamedTuple):
    """What csrc/cpu/product.h calls a product; indices count ``lefts``, then ``narrows``."""

    lefts: Sequence[Tensor]  # [M, depth]
    outputs: Sequence[Output]
    narrows: Sequence[Narrow] = ()


def multiply(*products: Product) -> None:
    """Compute products of bf16 matrices that do not read each other's results.

    Operands have any strides; what has neither contiguous rows nor contiguous columns is copied.
    Raises BackendUnavailable for tensors without memory.
    """
    read: list[Tensor] = []  # alive until the kernel has run

    def operand(tensor: Tensor, reduction: int) -> _Matrix:
        if 1 not in tensor.stride():
            tensor = tensor.contiguous()
        address, tensor = _readable(tensor)
        read.append(tensor)
        return (address, *_layout(tensor, reduction))

    def bias(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        address, tensor = _readable(tensor.contiguous())
        read.append(tensor)
        return address

    def output(o: Output) -> tuple:
        terms = [(left, operand(right, 0)) for left, right in o.terms]
        out = (o.out.data_ptr(), *_layout(o.out, 1), o.out.shape[1])
        return (*out, o.scale, bias(o.bias), terms)

    calls = [
        (
            product.lefts[0].shape[0],
            [(operand(left, 1), left.shape[1]) for left in product.lefts],
            [(output(narrow.product), narrow.scale) for narrow in product.narrows],
            [output(o) for o in product.outputs],
        )
        for product in products
    ]
    load().multiply(calls, torch.get_num_threads())


def _readable(tensor: Tensor) -> tuple[int, Tensor]:
    """The address of a tensor whose memory holds its values, and the tensor."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    plain = type(tensor) in (Tensor, Parameter)
    address = tensor.data_ptr() if plain else 0
    if not address and (tensor.numel() or not plain):
        raise BackendUnavailable(
            f"CPU kernels read plain tensors, got a {type(tensor).__name__} without memory of its "
            "own. Use 'eager'."
        )
    return address, tensor


def _layout(matrix: Tensor, reduction: int) -> tuple[int, bool]:
    """The stride of the slow index of a matrix, and whether that is the dimension ``reduction``."""
    strides = matrix.stride()
    if strides[reduction] == 1 or matrix.shape[reduction] == 1:
        return strides[1 - reduction], False
    return strides[reduction], True
