"""Checks of arguments; an error says which one, what was expected, what came and the remedy."""

from __future__ import annotations

import dataclasses
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
    "must be 0 or more": lambda value: value >= 0,
    "must be 0 (none) or more": lambda value: value >= 0,
    "must be positive": lambda value: value > 0,
    "must be a finite number": lambda value: True,
    "must be a finite number above 0": lambda value: value > 0,
    "must be above 1, or null for no early stop": lambda value: value > 1,
    "must be in [0, 1]": lambda value: 0 <= value <= 1,
    "must be above 0 and at most 1": lambda value: 0 < value <= 1,
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


def check_range(name: str, value: Any, wanted: str, whole: bool = False, remedy: str = "") -> Any:
    """The value as an int or a float.

    Raises ValueError unless it is a finite number as is wanted, one of `RANGES`.
    """
    if isinstance(value, numbers.Integral if whole else numbers.Real) and type(value) is not bool:
        found = int(value) if isinstance(value, numbers.Integral) else float(value)
        if abs(found) <= sys.float_info.max and RANGES[wanted](found):
            return found
    raise ValueError(
        f"{name} {wanted}, got {value!r}; give a {'whole' if whole else 'finite'} number in this "
        f"range{remedy}."
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
        remedy = ", or leave it out for the default"
        if isinstance(field.default, (int, float)):
            remedy += f" of {field.default}"
        parts: dict[str, Any] = {name: value}
        if isinstance(value, dict):
            parts = {f"{name}: {key}": part for key, part in value.items()}
        for part, number in parts.items():
            check_range(part, number, ranges[field.name], "int" in kind, remedy)


def check_mask(name: str, mask: Tensor) -> None:
    """Refuse what does not tell tokens (True, or 1, 2, ...) from what is left out (False, 0).

    Raises: ValueError: there are fractions, negative numbers or NaN.
    """
    if mask.dtype != torch.bool and not ((mask >= 0) & (mask == mask.round())).all():
        raise ValueError(
            f"{name} must be bool or whole numbers, 0 for tokens that are left out; tokens have no "
            "weights, and -100 or NaN mean nothing here."
        )
