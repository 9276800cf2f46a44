"""The precision in which PyTorch multiplies float32 matrices, which a user may lower.

There are two ways to lower it, ``allow_tf32`` and, from PyTorch 2.9 on, ``fp32_precision``, for all
devices or one. After the second was used the first must not be read: it raises.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

_LOWERED = ("tf32", "bf16")


def float32_precision(device_type: str) -> str:
    """The precision in force: "tf32", "bf16", or "ieee" also where nobody asked for anything."""
    settings = _settings(device_type)
    if settings is not None:
        found = settings.fp32_precision
        return found if found in _LOWERED else "ieee"
    allowed = torch.get_float32_matmul_precision()
    if device_type == "cuda":
        return "ieee" if allowed == "highest" else "tf32"
    return "bf16" if allowed == "medium" else "ieee"


def full_float32(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """In the block library products of float32 matrices are in float32, whatever was allowed."""
    return _raised(device.type) if lowered(device.type) else contextlib.nullcontext()


def lowered(device_type: str) -> bool:
    """True where products of float32 matrices are not in float32."""
    return float32_precision(device_type) in _LOWERED


@contextlib.contextmanager
def _raised(device_type: str) -> Iterator[None]:
    settings = _settings(device_type)
    if settings is None:
        allowed = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)
        return
    before, settings.fp32_precision = settings.fp32_precision, "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = "none"  # follows what holds for all devices
        if settings.fp32_precision != before:
            settings.fp32_precision = before


@functools.cache
def _settings(device_type: str) -> Any:
    """PyTorch's object for products on such a device; None before 2.9."""
    module = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    settings = getattr(module, "matmul", None)
    return settings if hasattr(settings, "fp32_precision") else None
