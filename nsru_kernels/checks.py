"""Checks of arguments; an error says which one, what was expected, what came and the remedy."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# What a setting must be -> whether a finite number is.
RANGES: dict[str, Callable[[Any], bool]] = {
    "must be ≥ 1": lambda value: value >= 1,
    "must not be negative": lambda value: value >= 0,
    "must be 0 (none) or more": lambda value: value >= 0,
    "must be positive": lambda value: value > 0,
    "must be a finite number": lambda value: True,
    "must be a finite number above 0": lambda value: value > 0,
    "must be above 1, or null for no early stop": lambda value: value > 1,
    "must be a share from 0 to 1": lambda value: 0 <= value <= 1,
    "must be a share above 0 and at most 1": lambda value: 0 < value <= 1,
    "must be a share from 0 to below 1": lambda value: 0 <= value < 1,
    "must be from 0 to 2³² - 1": lambda value: 0 <= value < 2**32,
}


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


def check_range(name: str, value: Any, wanted: str, whole: bool = False, default: Any = "") -> None:
    """Raise ValueError unless the value is a finite number as is wanted, one of `RANGES`."""
    right_kind = isinstance(value, numbers.Integral) if whole else _is_number(value)
    finite = right_kind and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not finite or not RANGES[wanted](value):
        kind = "whole" if whole else "finite"
        raise ValueError(
            f"{name} {wanted}, got {value!r}; give a {kind} number in this range, or leave "
            f"it out for the default{f' of {default}' * isinstance(default, (int, float))}."
        )


def check_settings(section: str, settings: Any, **ranges: str) -> None:
    """`check_range` of fields of a dataclass, of a dict's values each, and no None by mistake."""
    for field in dataclasses.fields(settings):
        value, kind = getattr(settings, field.name), str(field.type)
        name = f"{section}.{field.name}"
        if value is None and not re.search("None|Optional|Any$", kind):
            raise ValueError(f"{name} must have a value, got null; leave it out for the default.")
        if value is None or field.name not in ranges:
            continue
        parts: dict[str, Any] = {name: value}
        if isinstance(value, dict):
            parts = {f"{name}: {key}": part for key, part in value.items()}
        for part, number in parts.items():
            check_range(part, number, ranges[field.name], "int" in kind, field.default)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
