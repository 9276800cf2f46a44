"""Checks of arguments; an error says which one, what was expected, what came and the remedy."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor


def check_dense(function: str, **tensors: Any) -> None:
    """Raise TypeError unless all are dense tensors; basis and bias may be None."""
    for name, value in tensors.items():
        if value is None and name in ("basis", "bias"):
            continue
        got, remedy = f"a {type(value).__name__}", "torch.as_tensor makes one"
        if isinstance(value, Tensor):
            if value.is_nested:
                got, remedy = "a nested one", "torch.nested.to_padded_tensor makes one"
            elif value.is_quantized:
                got, remedy = f"a quantized one ({value.dtype})", "dequantize() makes one"
            elif value.layout is not torch.strided:
                got, remedy = f"one of layout {value.layout}", "to_dense() makes one"
            else:
                continue
        raise TypeError(f"{function}: {name} must be a dense tensor, got {got}; {remedy}.")


def check_whole(function: str, name: str, value: Any, least: int = 1) -> int:
    """The value as an int. Raises ValueError unless it is a whole number, ``least`` or more."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(
            f"{function}: {name} must be ≥ {least}, got {value!r}; give a whole number, {least} or "
            "more."
        )
    return int(value)


def check_number(function: str, name: str, value: Any) -> float:
    """The value as an int or a float. Raises ValueError unless it is a finite number."""
    if not _is_number(value) or not math.isfinite(value):
        raise ValueError(f"{function}: {name} must be a finite number, got {value!r}.")
    return value if isinstance(value, (int, float)) else float(value)


def check_probability(function: str, name: str, value: Any) -> float:
    """The value as an int or a float. Raises ValueError unless it is a number from 0 to 1."""
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{function}: {name} must be in [0, 1], got {value!r}.")
    return check_number(function, name, value)


def check_share(function: str, name: str, value: Any) -> None:
    """Raise ValueError unless 0 < value <= 1."""
    if not _is_number(value) or not 0 < value <= 1:
        raise ValueError(f"{function}: {name} must be above 0 and at most 1, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
